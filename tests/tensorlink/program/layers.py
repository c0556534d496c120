"""Every module class of torch.nn and every function of torch.nn.functional that training uses, with inputs for each."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Case = tuple[Callable[[], nn.Module], Callable[[int], tuple[Any, ...]]]


def _floats(*shape: int) -> Callable[[int], tuple[Tensor, ...]]:
    return lambda batch: (torch.randn(batch, *shape).requires_grad_(),)


def _two(*shape: int) -> Callable[[int], tuple[Tensor, ...]]:
    return lambda batch: (torch.randn(batch, *shape).requires_grad_(), torch.randn(batch, *shape))


def _classes(high: int, *shape: int) -> Callable[[int], tuple[Tensor, ...]]:
    return lambda batch: (torch.randn(batch, high, *shape).requires_grad_(), torch.randint(0, high, (batch, *shape)))


def _signs(batch: int) -> Tensor:
    return torch.randint(0, 2, (batch,)).float() * 2 - 1


def _chances(*shape: int) -> Callable[[int], tuple[Tensor, ...]]:
    return lambda batch: (torch.rand(batch, *shape).requires_grad_(), torch.rand(batch, *shape).round())


def _tokens(*shape: int) -> Callable[[int], tuple[Tensor, ...]]:
    return lambda batch: (torch.randint(0, 8, (batch, *shape)),)


def _ctc(batch: int) -> tuple[Tensor, ...]:
    return torch.randn(batch, 6, 5).requires_grad_(), torch.randint(1, 5, (batch, 3))


class Ctc(nn.Module):
    """CTC, whose first dimension is time."""

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        n = x.shape[0]
        lengths = torch.full((n,), 6), torch.full((n,), 3)
        return F.ctc_loss(x.log_softmax(-1).transpose(0, 1), target, *lengths, reduction="none")


class Unpooled(nn.Module):
    """Max pooling with indices and back."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.pool = getattr(nn, f"MaxPool{dims}d")(2, return_indices=True)
        self.unpool = getattr(nn, f"MaxUnpool{dims}d")(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.unpool(*self.pool(x))


class Attending(nn.Module):
    """Attention of a tensor to itself."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.attention(x, x, x)


class Containers(nn.Module):
    """Lists and dicts of modules and parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.modules_list = nn.ModuleList([nn.Linear(6, 6)])
        self.modules_dict = nn.ModuleDict({"a": nn.Linear(6, 6)})
        self.list = nn.ParameterList([nn.Parameter(torch.randn(6))])
        self.dict = nn.ParameterDict({"a": nn.Parameter(torch.randn(6))})

    def forward(self, x: Tensor) -> Tensor:
        return self.modules_dict["a"](self.modules_list[0](x)) * self.list[0] + self.dict["a"]


class Applied(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.function, self.args, self.kwargs = function, args, kwargs

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs, *self.args, **self.kwargs)


def _lazily(make: Callable[[], nn.Module], *shape: int) -> Callable[[], nn.Module]:
    """A lazy module as it is after its first call, which it needs before it can be traced."""

    def made() -> nn.Module:
        module = make()
        module(torch.randn(2, *shape))
        return module

    return made


def _each(name: str, make: Callable[[int], nn.Module], inputs: Callable[[tuple[int, ...]], Any]) -> dict[str, Case]:
    """One case for each of one, two and three dimensions."""
    sizes = ((9,), (7, 6), (5, 5, 5))
    return {f"{name}{dims}d": (partial(make, dims), inputs(sizes[dims - 1])) for dims in (1, 2, 3)}


def _nd(name: str, *args: Any, channels: int = 4, **kwargs: Any) -> dict[str, Case]:
    def make(dims: int) -> nn.Module:
        return getattr(nn, f"{name}{dims}d")(*args, **kwargs)

    return _each(name, make, lambda size: _floats(channels, *size))


_PLAIN_ACTIVATIONS = [
    "CELU",
    "ELU",
    "GELU",
    "Hardshrink",
    "Hardsigmoid",
    "Hardswish",
    "Hardtanh",
    "LeakyReLU",
    "LogSigmoid",
    "Mish",
    "PReLU",
    "ReLU",
    "ReLU6",
    "RReLU",
    "SELU",
    "SiLU",
    "Sigmoid",
    "Softplus",
    "Softshrink",
    "Softsign",
    "Tanh",
    "Tanhshrink",
]

MODULES: dict[str, Case] = {
    **{name: (getattr(nn, name), _floats(6)) for name in _PLAIN_ACTIVATIONS},
    "GLU": (nn.GLU, _floats(6)),
    "Threshold": (lambda: nn.Threshold(0.1, 20.0), _floats(6)),
    "Softmin": (lambda: nn.Softmin(-1), _floats(6)),
    "Softmax": (lambda: nn.Softmax(-1), _floats(6)),
    "Softmax2d": (nn.Softmax2d, _floats(3, 4, 4)),
    "LogSoftmax": (lambda: nn.LogSoftmax(-1), _floats(6)),
    "AdaptiveLogSoftmaxWithLoss": (
        lambda: nn.AdaptiveLogSoftmaxWithLoss(6, 10, [3, 6]),
        lambda batch: (torch.randn(batch, 6).requires_grad_(), torch.randint(0, 10, (batch,))),
    ),
    # layers
    "Identity": (nn.Identity, _floats(6)),
    "Linear": (lambda: nn.Linear(6, 4), _floats(6)),
    "Bilinear": (lambda: nn.Bilinear(6, 6, 4), _two(6)),
    "Embedding": (lambda: nn.Embedding(8, 6, padding_idx=0), _tokens(5)),
    "Embedding(max_norm)": (lambda: nn.Embedding(8, 6, max_norm=1.0), _tokens(5)),
    "Embedding(scale_grad_by_freq)": (lambda: nn.Embedding(8, 6, scale_grad_by_freq=True), _tokens(5)),
    "EmbeddingBag": (lambda: nn.EmbeddingBag(8, 6), _tokens(5)),
    "EmbeddingBag(sum)": (lambda: nn.EmbeddingBag(8, 6, mode="sum"), _tokens(5)),
    "EmbeddingBag(max)": (lambda: nn.EmbeddingBag(8, 6, mode="max"), _tokens(5)),
    "Flatten": (nn.Flatten, _floats(2, 3)),
    "Unflatten": (lambda: nn.Unflatten(1, (2, 3)), _floats(6)),
    "Sequential": (lambda: nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)), _floats(6)),
    "containers": (Containers, _floats(6)),
    **_nd("Conv", 4, 6, 3, padding=1, groups=2),
    **{f"{name}(same)": case for name, case in _nd("Conv", 4, 6, 3, padding="same", padding_mode="reflect").items()},
    **{f"{name}(circular)": case for name, case in _nd("Conv", 4, 6, 3, padding=1, padding_mode="circular").items()},
    **_nd("ConvTranspose", 4, 6, 3, stride=2, output_padding=1),
    "Unfold": (lambda: nn.Unfold(2), _floats(4, 6, 6)),
    "Fold": (lambda: nn.Fold((6, 6), 2), _floats(16, 25)),
    "PixelShuffle": (lambda: nn.PixelShuffle(2), _floats(4, 3, 3)),
    "PixelUnshuffle": (lambda: nn.PixelUnshuffle(2), _floats(3, 4, 4)),
    "ChannelShuffle": (lambda: nn.ChannelShuffle(2), _floats(4, 3, 3)),
    "Upsample(nearest)": (lambda: nn.Upsample(scale_factor=2), _floats(3, 4, 4)),
    "Upsample(bilinear)": (lambda: nn.Upsample(scale_factor=2, mode="bilinear"), _floats(3, 4, 4)),
    "Upsample(bicubic)": (lambda: nn.Upsample(size=(7, 7), mode="bicubic", align_corners=True), _floats(3, 4, 4)),
    "Upsample(linear)": (lambda: nn.Upsample(scale_factor=2, mode="linear"), _floats(3, 4)),
    "Upsample(trilinear)": (lambda: nn.Upsample(scale_factor=2, mode="trilinear"), _floats(3, 4, 4, 4)),
    "UpsamplingNearest2d": (lambda: nn.UpsamplingNearest2d(scale_factor=2), _floats(3, 4, 4)),
    "UpsamplingBilinear2d": (lambda: nn.UpsamplingBilinear2d(scale_factor=2), _floats(3, 4, 4)),
    # pooling
    **_nd("MaxPool", 2),
    **_nd("AvgPool", 2),
    **_nd("LPPool", 2.0, 2),
    **_nd("AdaptiveAvgPool", 2),
    **_nd("AdaptiveMaxPool", 2),
    **_each("MaxUnpool", Unpooled, lambda size: _floats(4, *(2 * (s // 2) for s in size))),
    "FractionalMaxPool2d": (lambda: nn.FractionalMaxPool2d(2, output_size=3), _floats(4, 7, 7)),
    "FractionalMaxPool3d": (lambda: nn.FractionalMaxPool3d(2, output_size=3), _floats(4, 7, 7, 7)),
    # padding
    **_nd("ConstantPad", 1, 0.5),
    **_nd("ZeroPad", 1),
    **_nd("ReflectionPad", 1),
    **_nd("ReplicationPad", 1),
    **_nd("CircularPad", 1),
    # normalisation
    **_nd("BatchNorm", 4),
    **{f"{name}(momentum=None)": case for name, case in _nd("BatchNorm", 4, momentum=None).items()},
    **_nd("InstanceNorm", 4, affine=True, track_running_stats=True),
    "SyncBatchNorm": (lambda: nn.SyncBatchNorm(4), _floats(4, 5)),
    "GroupNorm": (lambda: nn.GroupNorm(2, 4), _floats(4, 5)),
    "LayerNorm": (lambda: nn.LayerNorm(6), _floats(3, 6)),
    "RMSNorm": (lambda: nn.RMSNorm(6), _floats(3, 6)),
    "LocalResponseNorm": (lambda: nn.LocalResponseNorm(2), _floats(4, 5, 5)),
    "CrossMapLRN2d": (lambda: nn.CrossMapLRN2d(2), _floats(4, 5, 5)),
    # dropout
    "Dropout": (nn.Dropout, _floats(6)),
    "Dropout1d": (nn.Dropout1d, _floats(4, 6)),
    "Dropout2d": (nn.Dropout2d, _floats(4, 3, 3)),
    "Dropout3d": (nn.Dropout3d, _floats(4, 3, 3, 3)),
    "AlphaDropout": (nn.AlphaDropout, _floats(6)),
    "FeatureAlphaDropout": (nn.FeatureAlphaDropout, _floats(4, 3, 3)),
    # recurrent
    "RNN": (lambda: nn.RNN(6, 4, 2, batch_first=True), _floats(5, 6)),
    "RNN(relu)": (lambda: nn.RNN(6, 4, nonlinearity="relu", batch_first=True), _floats(5, 6)),
    "LSTM": (lambda: nn.LSTM(6, 4, 2, batch_first=True), _floats(5, 6)),
    "LSTM(bidirectional)": (lambda: nn.LSTM(6, 4, 2, batch_first=True, bidirectional=True), _floats(5, 6)),
    "LSTM(proj_size)": (lambda: nn.LSTM(6, 4, proj_size=3, batch_first=True), _floats(5, 6)),
    "LSTM(dropout)": (lambda: nn.LSTM(6, 4, 3, dropout=0.4, batch_first=True, bidirectional=True), _floats(5, 6)),
    "GRU": (lambda: nn.GRU(6, 4, 2, batch_first=True), _floats(5, 6)),
    "GRU(dropout)": (lambda: nn.GRU(6, 4, 2, dropout=0.4, batch_first=True), _floats(5, 6)),
    "RNN(dropout)": (lambda: nn.RNN(6, 4, 2, dropout=0.4, batch_first=True), _floats(5, 6)),
    "RNNCell": (lambda: nn.RNNCell(6, 4), _floats(6)),
    "LSTMCell": (lambda: nn.LSTMCell(6, 4), _floats(6)),
    "GRUCell": (lambda: nn.GRUCell(6, 4), _floats(6)),
    # attention
    "MultiheadAttention": (Attending, _floats(5, 8)),
    "TransformerEncoderLayer": (lambda: nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), _floats(5, 8)),
    "TransformerEncoder": (
        lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), 2, enable_nested_tensor=False
        ),
        _floats(5, 8),
    ),
    "TransformerDecoderLayer": (lambda: nn.TransformerDecoderLayer(8, 2, 16, 0.0, batch_first=True), _two(5, 8)),
    "TransformerDecoder": (
        lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 16, 0.0, batch_first=True), 2),
        _two(5, 8),
    ),
    "Transformer": (lambda: nn.Transformer(8, 2, 1, 1, 16, 0.0, batch_first=True), _two(5, 8)),
    # distances
    "CosineSimilarity": (nn.CosineSimilarity, _two(6)),
    "PairwiseDistance": (nn.PairwiseDistance, _two(6)),
    # losses
    "L1Loss": (nn.L1Loss, _two(6)),
    "MSELoss": (nn.MSELoss, _two(6)),
    "SmoothL1Loss": (nn.SmoothL1Loss, _two(6)),
    "HuberLoss": (nn.HuberLoss, _two(6)),
    "CrossEntropyLoss": (nn.CrossEntropyLoss, _classes(5)),
    "CrossEntropyLoss(label_smoothing)": (lambda: nn.CrossEntropyLoss(torch.ones(5), label_smoothing=0.1), _classes(5)),
    "CrossEntropyLoss(images)": (nn.CrossEntropyLoss, _classes(5, 3, 3)),
    "NLLLoss": (nn.NLLLoss, _classes(5)),
    "NLLLoss2d": (nn.NLLLoss2d, _classes(5, 3, 3)),
    "BCELoss": (nn.BCELoss, _chances(6)),
    "BCEWithLogitsLoss": (nn.BCEWithLogitsLoss, _chances(6)),
    "KLDivLoss": (lambda: nn.KLDivLoss(reduction="batchmean"), _chances(6)),
    "PoissonNLLLoss": (nn.PoissonNLLLoss, _chances(6)),
    "GaussianNLLLoss": (
        nn.GaussianNLLLoss,
        lambda batch: (torch.randn(batch, 6).requires_grad_(), torch.randn(batch, 6), torch.rand(batch, 6)),
    ),
    "SoftMarginLoss": (nn.SoftMarginLoss, lambda batch: (torch.randn(batch).requires_grad_(), _signs(batch))),
    "HingeEmbeddingLoss": (nn.HingeEmbeddingLoss, lambda batch: (torch.randn(batch).requires_grad_(), _signs(batch))),
    "MarginRankingLoss": (
        nn.MarginRankingLoss,
        lambda batch: (torch.randn(batch).requires_grad_(), torch.randn(batch), _signs(batch)),
    ),
    "CosineEmbeddingLoss": (
        nn.CosineEmbeddingLoss,
        lambda batch: (torch.randn(batch, 6).requires_grad_(), torch.randn(batch, 6), _signs(batch)),
    ),
    "TripletMarginLoss": (
        nn.TripletMarginLoss,
        lambda batch: (torch.randn(batch, 6).requires_grad_(), torch.randn(batch, 6), torch.randn(batch, 6)),
    ),
    "TripletMarginWithDistanceLoss": (
        nn.TripletMarginWithDistanceLoss,
        lambda batch: (torch.randn(batch, 6).requires_grad_(), torch.randn(batch, 6), torch.randn(batch, 6)),
    ),
    "MultiMarginLoss": (nn.MultiMarginLoss, _classes(5)),
    "MultiLabelMarginLoss": (
        nn.MultiLabelMarginLoss,
        lambda batch: (torch.randn(batch, 4).requires_grad_(), torch.randint(0, 4, (batch, 4))),
    ),
    "MultiLabelSoftMarginLoss": (nn.MultiLabelSoftMarginLoss, _chances(6)),
    "LinearCrossEntropyLoss": (
        lambda: nn.LinearCrossEntropyLoss(6, 5),
        lambda batch: (torch.randn(batch, 6).requires_grad_(), torch.randint(0, 5, (batch,))),
    ),
    "CTCLoss": (Ctc, _ctc),
    # reparametrisations
    "weight_norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(6, 4)), _floats(6)),
    "weight_norm (old)": (lambda: nn.utils.weight_norm(nn.Linear(6, 4)), _floats(6)),
    "spectral_norm": (lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(6, 4)), _floats(6)),
    "spectral_norm (old)": (lambda: nn.utils.spectral_norm(nn.Linear(6, 4)), _floats(6)),
    "orthogonal": (lambda: nn.utils.parametrizations.orthogonal(nn.Linear(4, 4)), _floats(4)),
    # lazy modules, after their first call
    "LazyLinear": (_lazily(lambda: nn.LazyLinear(4), 6), _floats(6)),
    "LazyConv1d": (_lazily(lambda: nn.LazyConv1d(4, 3), 3, 9), _floats(3, 9)),
    "LazyConv2d": (_lazily(lambda: nn.LazyConv2d(4, 3), 3, 7, 7), _floats(3, 7, 7)),
    "LazyConv3d": (_lazily(lambda: nn.LazyConv3d(4, 3), 3, 5, 5, 5), _floats(3, 5, 5, 5)),
    "LazyConvTranspose1d": (_lazily(lambda: nn.LazyConvTranspose1d(4, 3), 3, 9), _floats(3, 9)),
    "LazyConvTranspose2d": (_lazily(lambda: nn.LazyConvTranspose2d(4, 3), 3, 7, 7), _floats(3, 7, 7)),
    "LazyConvTranspose3d": (_lazily(lambda: nn.LazyConvTranspose3d(4, 3), 3, 5, 5, 5), _floats(3, 5, 5, 5)),
    "LazyBatchNorm1d": (_lazily(nn.LazyBatchNorm1d, 3, 9), _floats(3, 9)),
    "LazyBatchNorm2d": (_lazily(nn.LazyBatchNorm2d, 3, 7, 7), _floats(3, 7, 7)),
    "LazyBatchNorm3d": (_lazily(nn.LazyBatchNorm3d, 3, 5, 5, 5), _floats(3, 5, 5, 5)),
    "LazyInstanceNorm1d": (_lazily(nn.LazyInstanceNorm1d, 3, 9), _floats(3, 9)),
    "LazyInstanceNorm2d": (_lazily(nn.LazyInstanceNorm2d, 3, 7, 7), _floats(3, 7, 7)),
    "LazyInstanceNorm3d": (_lazily(nn.LazyInstanceNorm3d, 3, 5, 5, 5), _floats(3, 5, 5, 5)),
}  # fmt: skip


def _f(name: str, *args: Any, **kwargs: Any) -> Callable[[], nn.Module]:
    return lambda: Applied(getattr(F, name), *args, **kwargs)


def _grid(batch: int) -> tuple[Tensor, ...]:
    return torch.randn(batch, 3, 5, 5).requires_grad_(), torch.rand(batch, 4, 4, 2) * 2 - 1


_WEIGHTED = {
    "linear": (lambda: (torch.randn(4, 6),), _floats(6)),
    "conv1d": (lambda: (torch.randn(4, 3, 3),), _floats(3, 8)),
    "conv2d": (lambda: (torch.randn(4, 3, 3, 3),), _floats(3, 8, 8)),
    "conv3d": (lambda: (torch.randn(4, 3, 3, 3, 3),), _floats(3, 5, 5, 5)),
    "conv_tbc": (lambda: (torch.randn(3, 6, 4), torch.randn(4)), _floats(5, 6)),
    "conv_transpose1d": (lambda: (torch.randn(3, 4, 3),), _floats(3, 8)),
    "conv_transpose2d": (lambda: (torch.randn(3, 4, 3, 3),), _floats(3, 8, 8)),
    "conv_transpose3d": (lambda: (torch.randn(3, 4, 3, 3, 3),), _floats(3, 5, 5, 5)),
    "prelu": (lambda: (torch.rand(6),), _floats(6)),
}

FUNCTIONS: dict[str, Case] = {
    **{
        name: (_f(name), _floats(6))
        for name in [
            "celu",
            "elu",
            "gelu",
            "hardshrink",
            "hardsigmoid",
            "hardswish",
            "hardtanh",
            "leaky_relu",
            "logsigmoid",
            "mish",
            "relu",
            "relu6",
            "rrelu",
            "selu",
            "sigmoid",
            "silu",
            "softplus",
            "softshrink",
            "softsign",
            "tanh",
            "tanhshrink",
            "glu",
            "normalize",
            "dropout",
            "alpha_dropout",
        ]
    },
    **{
        f"{name}(inplace)": (_f(name, inplace=True), lambda batch: (torch.randn(batch, 6),))
        for name in ("elu", "relu", "silu", "hardswish", "leaky_relu", "celu", "selu", "mish", "relu6", "hardtanh")
    },
    "threshold": (_f("threshold", 0.1, 20.0), _floats(6)),
    "softmax": (_f("softmax", -1), _floats(6)),
    "softmin": (_f("softmin", -1), _floats(6)),
    "log_softmax": (_f("log_softmax", -1), _floats(6)),
    "gumbel_softmax": (_f("gumbel_softmax"), _floats(6)),
    "gumbel_softmax(hard)": (_f("gumbel_softmax", hard=True), _floats(6)),
    "layer_norm": (_f("layer_norm", (6,)), _floats(6)),
    "rms_norm": (_f("rms_norm", (6,)), _floats(6)),
    "group_norm": (_f("group_norm", 2), _floats(4, 5)),
    "batch_norm": (_f("batch_norm", None, None, training=True), _floats(4, 5)),
    "instance_norm": (_f("instance_norm"), _floats(4, 5)),
    "local_response_norm": (_f("local_response_norm", 2), _floats(4, 5, 5)),
    "dropout1d": (_f("dropout1d"), _floats(4, 6)),
    "dropout2d": (_f("dropout2d"), _floats(4, 3, 3)),
    "dropout3d": (_f("dropout3d"), _floats(4, 3, 3, 3)),
    "feature_alpha_dropout": (_f("feature_alpha_dropout", training=True), _floats(4, 3, 3)),
    "avg_pool1d": (_f("avg_pool1d", 2), _floats(4, 8)),
    "avg_pool2d": (_f("avg_pool2d", 2), _floats(4, 8, 8)),
    "avg_pool3d": (_f("avg_pool3d", 2), _floats(4, 4, 4, 4)),
    "max_pool1d": (_f("max_pool1d", 2), _floats(4, 8)),
    "max_pool2d": (_f("max_pool2d", 2), _floats(4, 8, 8)),
    "max_pool3d": (_f("max_pool3d", 2), _floats(4, 4, 4, 4)),
    "lp_pool1d": (_f("lp_pool1d", 2.0, 2), _floats(4, 8)),
    "lp_pool2d": (_f("lp_pool2d", 2.0, 2), _floats(4, 8, 8)),
    "lp_pool3d": (_f("lp_pool3d", 2.0, 2), _floats(4, 4, 4, 4)),
    "adaptive_avg_pool1d": (_f("adaptive_avg_pool1d", 2), _floats(4, 8)),
    "adaptive_avg_pool2d": (_f("adaptive_avg_pool2d", 2), _floats(4, 8, 8)),
    "adaptive_avg_pool3d": (_f("adaptive_avg_pool3d", 2), _floats(4, 4, 4, 4)),
    "adaptive_max_pool1d": (_f("adaptive_max_pool1d", 2), _floats(4, 8)),
    "adaptive_max_pool2d": (_f("adaptive_max_pool2d", 2), _floats(4, 8, 8)),
    "adaptive_max_pool3d": (_f("adaptive_max_pool3d", 2), _floats(4, 4, 4, 4)),
    "max_unpool1d": (lambda: Unpooled(1), _floats(4, 8)),
    "max_unpool2d": (lambda: Unpooled(2), _floats(4, 8, 8)),
    "max_unpool3d": (lambda: Unpooled(3), _floats(4, 4, 4, 4)),
    "fractional_max_pool2d": (_f("fractional_max_pool2d", 2, output_size=3), _floats(4, 7, 7)),
    "fractional_max_pool3d": (_f("fractional_max_pool3d", 2, output_size=3), _floats(4, 7, 7, 7)),
    "unfold": (_f("unfold", 2), _floats(4, 6, 6)),
    "fold": (_f("fold", (6, 6), 2), _floats(16, 25)),
    "pad": (_f("pad", (1, 1)), _floats(4, 6)),
    "pad(reflect)": (_f("pad", (1, 1), mode="reflect"), _floats(4, 6)),
    "pad(circular)": (_f("pad", (1, 1), mode="circular"), _floats(4, 6)),
    "interpolate": (_f("interpolate", scale_factor=2.0), _floats(3, 4, 4)),
    "interpolate(area)": (_f("interpolate", size=(3, 3), mode="area"), _floats(3, 6, 6)),
    "interpolate(nearest-exact)": (_f("interpolate", size=(3, 3), mode="nearest-exact"), _floats(3, 6, 6)),
    "interpolate(antialias)": (_f("interpolate", size=(3, 3), mode="bilinear", antialias=True), _floats(3, 6, 6)),
    "upsample": (_f("upsample", scale_factor=2), _floats(3, 4, 4)),
    "upsample_nearest": (_f("upsample_nearest", scale_factor=2), _floats(3, 4, 4)),
    "upsample_bilinear": (_f("upsample_bilinear", scale_factor=2), _floats(3, 4, 4)),
    "grid_sample": (_f("grid_sample", align_corners=False), _grid),
    "affine_grid": (
        lambda: Applied(lambda theta: F.affine_grid(theta, [theta.shape[0], 3, 4, 4], align_corners=False)),
        _floats(2, 3),
    ),
    "pixel_shuffle": (_f("pixel_shuffle", 2), _floats(4, 3, 3)),
    "pixel_unshuffle": (_f("pixel_unshuffle", 2), _floats(3, 4, 4)),
    "channel_shuffle": (_f("channel_shuffle", 2), _floats(4, 3, 3)),
    "one_hot": (_f("one_hot", 8), _tokens(5)),
    "embedding": (lambda: Applied(lambda ids, table: F.embedding(ids, table), torch.randn(8, 6)), _tokens(5)),
    "embedding_bag": (lambda: Applied(lambda ids, table: F.embedding_bag(ids, table), torch.randn(8, 6)), _tokens(5)),
    "cosine_similarity": (_f("cosine_similarity"), _two(6)),
    "pairwise_distance": (_f("pairwise_distance"), _two(6)),
    "pdist": (_f("pdist"), _floats(6)),
    "scaled_dot_product_attention": (
        lambda: Applied(lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True)),
        _floats(2, 5, 8),
    ),
    "scaled_dot_product_attention(gqa)": (
        lambda: Applied(lambda x: F.scaled_dot_product_attention(x, x[:, :1], x[:, :1], enable_gqa=True)),
        _floats(2, 5, 8),
    ),
    **{
        name: (lambda name=name, weights=weights: Applied(getattr(F, name), *weights()), inputs)  # type: ignore[misc]
        for name, (weights, inputs) in _WEIGHTED.items()
    },
    "bilinear": (lambda: Applied(lambda x, y, w: F.bilinear(x, y, w), torch.randn(4, 6, 6)), _two(6)),
    "binary_cross_entropy": (_f("binary_cross_entropy"), _chances(6)),
    "binary_cross_entropy_with_logits": (_f("binary_cross_entropy_with_logits"), _chances(6)),
    "cosine_embedding_loss": (_f("cosine_embedding_loss"), MODULES["CosineEmbeddingLoss"][1]),
    "cross_entropy": (_f("cross_entropy", ignore_index=2, label_smoothing=0.1), _classes(5)),
    "cross_entropy(probabilities)": (
        _f("cross_entropy"),
        lambda batch: (torch.randn(batch, 5).requires_grad_(), torch.rand(batch, 5).softmax(-1)),
    ),
    "ctc_loss": (Ctc, _ctc),
    "gaussian_nll_loss": (_f("gaussian_nll_loss"), MODULES["GaussianNLLLoss"][1]),
    "gaussian_nll_loss(var=1.0)": (_f("gaussian_nll_loss", 1.0), _two(6)),
    "hinge_embedding_loss": (_f("hinge_embedding_loss"), MODULES["HingeEmbeddingLoss"][1]),
    "huber_loss": (_f("huber_loss"), _two(6)),
    "kl_div": (_f("kl_div", reduction="batchmean"), _chances(6)),
    "l1_loss": (_f("l1_loss"), _two(6)),
    "margin_ranking_loss": (_f("margin_ranking_loss"), MODULES["MarginRankingLoss"][1]),
    "mse_loss": (_f("mse_loss"), _two(6)),
    "multi_margin_loss": (_f("multi_margin_loss"), _classes(5)),
    "multilabel_margin_loss": (_f("multilabel_margin_loss"), MODULES["MultiLabelMarginLoss"][1]),
    "multilabel_soft_margin_loss": (_f("multilabel_soft_margin_loss"), _chances(6)),
    "nll_loss": (_f("nll_loss"), _classes(5)),
    "poisson_nll_loss": (_f("poisson_nll_loss"), _chances(6)),
    "smooth_l1_loss": (_f("smooth_l1_loss"), _two(6)),
    "soft_margin_loss": (_f("soft_margin_loss"), MODULES["SoftMarginLoss"][1]),
    "triplet_margin_loss": (_f("triplet_margin_loss"), MODULES["TripletMarginLoss"][1]),
    "triplet_margin_with_distance_loss": (_f("triplet_margin_with_distance_loss"), MODULES["TripletMarginLoss"][1]),
    "linear_cross_entropy": (
        lambda: Applied(lambda x, t, w: F.linear_cross_entropy(x, w, t), torch.randn(5, 6)),
        MODULES["LinearCrossEntropyLoss"][1],
    ),
    "multi_head_attention_forward": (Attending, _floats(5, 8)),
}
