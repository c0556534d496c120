"""A network's beginning, on a chain of one's own: key files for everybody, the contracts, everybody registered.

In one folder: `addresses.json`, and for each member a folder of its name with `identity.json` and `account.json`. The
accounts are those of the embedded chain, which have funds; number 0 deploys.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from smartnodes_core.chain.account import load_account_key, save_account_key
from smartnodes_core.chain.devnet.accounts import devnet_key
from smartnodes_core.chain.settings import Addresses, ChainSettings
from smartnodes_core.identity import Identity
from smartnodes_core.nodes.membership import Membership
from smartnodes_core.records import Role

ADDRESSES = "addresses.json"


def make_keys(folder: Path, account: int) -> None:
    """Key files in `folder`, with the embedded chain's account of that number; those that are there stay."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not (folder / "identity.json").exists():
        Identity.create().save(folder / "identity.json")
    if not (folder / "account.json").exists():
        save_account_key(folder / "account.json", devnet_key(account))


def found(
    folder: Path, url: str, network_id: int, members: Mapping[str, tuple[Role, int]], settings: ChainSettings
) -> Addresses:
    """Deploys on the chain at `url` and registers `members` (role and account number by name).

    They are registered before the first round: who comes later waits until a round admits it, and what the first
    validators audit alone a quorum could not sign for. Raises ChainError.
    """
    from smartnodes_core.chain.client import ChainClient
    from smartnodes_core.chain.deploy import deploy

    for name, (_, account) in members.items():
        make_keys(folder / name, account)
    addresses = deploy(url, devnet_key(0), settings)
    for name, (role, _) in members.items():
        chain = ChainClient(url, addresses, load_account_key(folder / name / "account.json"))
        Membership(chain, network_id).join(role, Identity.load(folder / name / "identity.json").node_key)
    addresses.write(folder / ADDRESSES)
    return addresses


def settings_of(folder: Path, name: str, url: str) -> dict[str, str]:
    """What the settings of every member's node say: its keys, the contracts, the chain."""
    return {
        "identity": str(folder / name / "identity.json"),
        "account": str(folder / name / "account.json"),
        "addresses": str(folder / ADDRESSES),
        "rpc_url": url,
    }
