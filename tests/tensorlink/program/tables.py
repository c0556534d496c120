"""What does not run and why: the tables that the tests hold against the program and against docs/models.md."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

DOCS = Path(__file__).parents[3] / "docs" / "models.md"


class Refused(NamedTuple):
    """`message` is a pattern of the error; `reason` and `remedy` are for the docs."""

    message: str
    reason: str
    remedy: str


_SIZES = "the values of its data"
_BATCH = "fixes the batch size"

REFUSED_LAYERS: dict[str, Refused] = {
    "AdaptiveLogSoftmaxWithLoss": Refused(
        _SIZES, "each cluster's rows are picked by the targets", "`Linear` and `cross_entropy`"
    ),
    **dict.fromkeys(
        [f"BatchNorm{dims}d(momentum=None)" for dims in (1, 2, 3)],
        Refused(_SIZES, "the average's weight is read from a buffer", "a number for `momentum`"),
    ),
    "Embedding(max_norm)": Refused(
        "max_norm", "the lookup writes into the weight", "clip the looked-up rows, as the error says"
    ),
    "FractionalMaxPool3d": Refused(_BATCH, "torch.export fixes its batch size", "`MaxPool3d`"),
    "CrossMapLRN2d": Refused(
        "autograd.Function|" + _BATCH, "has a backward of its own, and a loop over the batch", "`LocalResponseNorm`"
    ),
    "GaussianNLLLoss": Refused(
        _SIZES, "looks for negative variances", "write it out: `0.5 * (var.log() + (x - y) ** 2 / var)`"
    ),
    "CTCLoss": Refused("cannot be traced", "the size of its workspace depends on the lengths", "compute it outside"),
    "F.fractional_max_pool3d": Refused(_BATCH, "torch.export fixes its batch size", "`max_pool3d`"),
    "F.pdist": Refused(_BATCH, "its size grows with the square of the batch", "`torch.cdist(x, x)`"),
    "F.conv_tbc": Refused(_BATCH, "its batch is not the first dimension", "`conv1d`"),
    "F.ctc_loss": Refused("cannot be traced", "the size of its workspace depends on the lengths", "compute it outside"),
    "F.gaussian_nll_loss": Refused(_SIZES, "looks for negative variances", "write it out, or give `var` as a number"),
}

REFUSED_ARCHITECTURES: dict[str, Refused] = {
    "bloom": Refused(
        "autograd.Function GeLUFunction", "its GELU has a backward of its own, which a program cannot hold", ""
    ),
    "rwkv": Refused("writes into its parameter", "rescales its weights when it changes mode", "`rescale_every=0`"),
}


def layer_rows() -> list[str]:
    """The rows of the docs' table of layers."""
    return [f"| `{name}` | {why.reason} | {why.remedy} |" for name, why in REFUSED_LAYERS.items()]


def architecture_rows(names: list[str]) -> list[str]:
    """The rows of the docs' table of architectures."""
    rows = []
    for name in names:
        why = REFUSED_ARCHITECTURES.get(name)
        answer = "no: " + "; ".join(part for part in (why.reason, why.remedy) if part) if why else "yes"
        rows.append(f"| {name} | {answer} |")
    return rows


def rows_of_docs(heading: str) -> list[str]:
    """The rows of the table under a heading of docs/models.md, without its head."""
    text = DOCS.read_text(encoding="utf-8").split(heading + "\n", 1)[1].split("\n## ", 1)[0]
    return [line for line in text.splitlines() if line.startswith("|")][2:]


def write() -> None:
    """Puts the tables into docs/models.md."""
    from architectures import ARCHITECTURES

    text = DOCS.read_text(encoding="utf-8")
    for heading, rows in (
        ("## Layers that are refused", layer_rows()),
        ("## Architectures of transformers", architecture_rows(list(ARCHITECTURES))),
    ):
        before, after = text.split(heading + "\n", 1)
        section, *rest = after.split("\n## ", 1)
        lines = section.splitlines()
        first = next(at for at, line in enumerate(lines) if line.startswith("|---")) + 1
        last = next((at for at in range(first, len(lines)) if not lines[at].startswith("|")), len(lines))
        section = "\n".join([*lines[:first], *rows, *lines[last:], *[""] * bool(rest)])
        text = before + heading + "\n" + "\n## ".join([section, *rest])
    DOCS.write_text(text.rstrip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    write()
