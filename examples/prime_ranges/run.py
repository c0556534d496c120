"""A network of this machine that looks for primes: `python examples/prime_ranges/run.py demo --below 1000000`.

`demo` starts a chain, a validator and workers as processes and is the user; the processes are this program's
`validator SETTINGS.toml` and `worker SETTINGS.toml`. With `--lazy N` the last N workers find nothing and say so.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from primes import JOB_TYPE, SPEC, STEP, UNITS, PrimeAuditor, PrimeHandler, confidence, none_at_all, primes_of, root_of

from smartnodes_core.chain.account import save_account_key
from smartnodes_core.chain.client import ChainClient
from smartnodes_core.chain.deploy import deploy
from smartnodes_core.chain.devnet.accounts import devnet_key
from smartnodes_core.chain.devnet.launcher import DevnetProcess
from smartnodes_core.chain.settings import SNO, ChainSettings
from smartnodes_core.chain.signing import address_of
from smartnodes_core.config import UserConfig, ValidatorConfig, WorkerConfig, load
from smartnodes_core.errors import SmartnodesError
from smartnodes_core.identity import Identity
from smartnodes_core.jobs import Job, StageOfJob, spec_digest
from smartnodes_core.nodes.membership import Membership
from smartnodes_core.nodes.running import running_validator, running_worker
from smartnodes_core.nodes.station import Station
from smartnodes_core.nodes.user import JobListener, UserNode
from smartnodes_core.nodes.validator import ValidatorSettings
from smartnodes_core.records import NO_DIGEST, Assignment, AuditTerms, Commitment, JobRecord, Plan, Role, Verdict
from smartnodes_core.reputation import NEWCOMER

NETWORK = 1
#: Of four units one is audited on average, of twenty blocks one as a whole.
TERMS = AuditTerms(unit_rate_ppm=250_000, step_rate_ppm=50_000, window_steps=64, window_s=600, auditors=[])


class Ledger(JobListener):
    """What the user hears: what was committed to, and who was found cheating."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.roots: dict[tuple[bytes, int], list[bytes]] = {}
        self.frauds: set[bytes] = set()

    def on_commitment(self, commitment: Commitment) -> None:
        with self.changed:
            self.roots[commitment.worker, commitment.step] = [unit.roots["primes"] for unit in commitment.units]
            self.changed.notify_all()

    def on_verdict(self, verdict: Verdict) -> None:
        with self.changed:
            if verdict.finding == "fraudulent":
                self.frauds.add(verdict.worker)
            self.changed.notify_all()


def search(station: Station, below: int) -> int:
    """How many primes there are below `below`, as the network's workers find them."""
    user, ledger = UserNode(station.node, station.identity), Ledger()
    workers, validators = station.find("worker"), station.find("validator")
    record = JobRecord(
        network_id=NETWORK,
        job_type=JOB_TYPE,
        author=station.identity.node_key,
        nonce=user.nonce(),
        created_at_s=int(time.time()),
        num_stages=1,
        num_replicas=len(workers),
        specs=[spec_digest(SPEC)],
        initial_roots=[NO_DIGEST],
        work_units=[1],
        audit=TERMS,
        terms={},
    )
    plan = Plan(
        job=record.digest(),
        version=0,
        assignments=[
            Assignment(stage=0, replica=number, worker=worker.node_key, endpoint=worker.endpoints[0])
            for number, worker in enumerate(workers)
        ],
        spares=[],
        validators=[validator.node_key for validator in validators],
        reason="every worker that there is",
    )
    job = user.open_job(record, plan, ledger)
    found: dict[bytes, dict[int, int]] = {worker.node_key: {} for worker in workers}
    left = list(range(-(-below // STEP)))
    while left:
        trusted = [number for number, worker in enumerate(workers) if worker.node_key not in ledger.frauds]
        if not trusted:
            raise SystemExit("every worker was found cheating: nothing is known")
        blocks, left = left[: len(trusted)], left[len(trusted) :]
        for number, block in zip(trusted, blocks, strict=False):
            worker = workers[number].node_key
            try:
                found[worker][block] = ask(user, job, number, block, below, ledger)
            except SmartnodesError as error:
                sys.stderr.write(f"block {block}: {error}\n")
                left.append(block)
        if not left:  # the last verdicts come a moment after the last blocks
            with ledger.changed:
                ledger.changed.wait(1.0)
        for worker in ledger.frauds:  # nothing that it said counts
            left += found.get(worker, {})
            found[worker] = {}
    user.close_job(job)
    return sum(sum(blocks.values()) for blocks in found.values())


def ask(user: UserNode, job: Job, replica: int, block: int, below: int, ledger: Ledger) -> int:
    """The number of primes of one block, as its worker finds and commits to them."""
    stage = StageOfJob(job, 0, replica)
    reply = user.begin_call(stage, "search", {"block": block}, timeout_s=60, max_body_bytes=STEP * 8).result()
    primes = [int.from_bytes(reply.body[at : at + 8], "big") for at in range(0, len(reply.body), 8)]
    units = [[prime for prime in primes if (prime // (STEP // UNITS)) % UNITS == unit] for unit in range(UNITS)]
    roots = [root_of(b"".join(prime.to_bytes(8, "big") for prime in unit)) for unit in units]
    place = (job.worker_of(0, replica), block)
    with ledger.changed:  # it is audited for what it committed to, so that has to be what it told us
        if not ledger.changed.wait_for(lambda: place in ledger.roots, 30) or ledger.roots[place] != roots:
            raise SystemExit(f"block {block}: the worker did not commit to what it answered")
    return sum(prime < below for prime in primes)


def demo(below: int, num_workers: int, num_lazy: int) -> None:
    """Starts everything, searches, and waits until rounds have told the chain what was found of the workers."""
    with tempfile.TemporaryDirectory() as name, DevnetProcess() as devnet:
        folder = Path(name)
        names: dict[str, Role] = {"user": "user", "validator": "validator"}
        names |= {f"worker-{number}": "worker" for number in range(num_workers)}
        chain, keys = found_network(folder, devnet.url, names)
        processes = []
        try:
            bootstrap = launch(processes, folder, "validator", "validator")
            for number in range(num_workers):
                lazy = ["--lazy"] if number >= num_workers - num_lazy else []
                launch(processes, folder, "worker", f"worker-{number}", bootstrap, *lazy)
            settings = write_settings(folder, "user", [bootstrap])
            station = Station.open(load(UserConfig, settings), "user")
            try:
                station.join()
                count = search(station, below)
                deadline, pause = time.monotonic() + 60, threading.Event()
                while True:  # until a round has carried what audits found of each
                    members = {member.account: member.reputation for member in chain.members(NETWORK)}
                    found = {each: members[address_of(key)] for each, key in keys.items() if names[each] == "worker"}
                    if NEWCOMER not in found.values() or time.monotonic() > deadline:
                        break
                    pause.wait(0.5)
            finally:
                station.close()
            sys.stdout.write(json.dumps({"primes": count, "reputations": found}) + "\n")
        finally:
            for process in processes:
                process.stdin.close()  # their end
            for process in processes:
                process.wait(20)


def found_network(folder: Path, url: str, names: dict[str, Role]) -> tuple[ChainClient, dict[str, bytes]]:
    """Key files for everybody, the contracts, and everybody registered."""
    keys = {name: devnet_key(number) for number, name in enumerate(names, start=1)}
    genesis = {address_of(keys["validator"]): 1_000_000 * SNO}
    addresses = deploy(url, devnet_key(0), ChainSettings(round_interval_s=2, claim_delay_s=2, genesis=genesis))
    addresses.write(folder / "addresses.json")
    for name, role in names.items():
        (folder / name).mkdir()
        identity = Identity.create()
        identity.save(folder / name / "identity.json")
        save_account_key(folder / name / "account.json", keys[name])
        Membership(ChainClient(url, addresses, keys[name]), NETWORK).join(role, identity.node_key)
        (folder / name / "rpc_url").write_text(url)
    return ChainClient(url, addresses), keys


def write_settings(folder: Path, name: str, bootstrap: list[str]) -> Path:
    home = folder / name
    lines = {key: str(home / f"{key}.json") for key in ("identity", "account")}
    lines |= {"addresses": str(folder / "addresses.json"), "rpc_url": (home / "rpc_url").read_text()}
    if name != "user":
        lines["data_dir"] = str(home)
    text = "".join(f"{key} = {json.dumps(value)}\n" for key, value in lines.items())
    path = home / "settings.toml"
    path.write_text(f"{text}bootstrap = {json.dumps(bootstrap)}\nchain_poll_interval_s = 2.0\n")
    return path


def launch(processes: list, folder: Path, role: str, name: str, *rest: str) -> str:
    """Starts a node's process; its endpoint, once it is ready."""
    bootstrap = [each for each in rest if not each.startswith("--")]
    flags = [each for each in rest if each.startswith("--")]
    settings = write_settings(folder, name, bootstrap)
    command = [sys.executable, __file__, role, str(settings), *flags]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    processes.append(process)
    return process.stdout.readline().strip()


def serve(station: Station) -> None:
    sys.stdout.write(station.node.endpoint + "\n")
    sys.stdout.flush()
    sys.stdin.read()  # until the starter has ended


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for role in ("validator", "worker"):
        commands.add_parser(role).add_argument("settings", type=Path)
    commands.choices["worker"].add_argument("--lazy", action="store_true", help="finds nothing, and says so")
    flags = commands.add_parser("demo")
    for name, default in (("below", 1_000_000), ("workers", 2), ("lazy", 0)):
        flags.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    if options.command == "demo":
        demo(options.below, options.workers, options.lazy)
    elif options.command == "validator":
        settings = ValidatorSettings(list_interval_s=0.1, poll_s=0.5, reputation_rule=confidence)
        with running_validator(load(ValidatorConfig, options.settings), PrimeAuditor(), settings) as station:
            serve(station)
    else:
        handler = PrimeHandler(none_at_all if options.lazy else primes_of)
        with running_worker(load(WorkerConfig, options.settings), handler) as station:
            serve(station)


if __name__ == "__main__":
    main()
