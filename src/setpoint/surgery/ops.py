"""What the operations of a forward pass are, by name.

A tape records calls such as ``Tensor.__iadd__``, ``torch.ops.aten.mm.default`` or the getter of ``Tensor.mT``. Here
each gets one plain name (``"add"``, ``"matmul"``, ``"mT"``), and the names fall into the few kinds that reading a
network needs: ops that only move values, element-wise functions, norms, and ops that contract with a weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_REFLECTED = {"radd": "add", "rmul": "mul", "rsub": "sub", "rdiv": "div", "rtruediv": "div", "rmatmul": "matmul"}
_IN_PLACE = {"iadd": "add", "isub": "sub", "imul": "mul", "idiv": "div", "itruediv": "div", "imatmul": "matmul"}
_SYNONYMS = {
    "truediv": "div",
    "true_divide": "div",
    "divide": "div",
    "multiply": "mul",
    "subtract": "sub",
    "mm": "matmul",
    "mv": "matmul",
    "bmm": "matmul",
    "_grouped_mm": "grouped_mm",
    "grouped_mm_fallback": "grouped_mm",
    "_scaled_mm": "matmul",
    "_native_batch_norm_legit_no_training": "batch_norm",
    "native_batch_norm": "batch_norm",
    "native_layer_norm": "layer_norm",
    "native_group_norm": "group_norm",
    "_fused_rms_norm": "rms_norm",
    "_softmax": "softmax",
    "_to_copy": "to",
    "_conv_depthwise2d": "conv2d",
    "convolution": "conv",
    "hardtanh": "hardtanh",
    "_scaled_dot_product_flash_attention_for_cpu": "scaled_dot_product_attention",
    "_prelu_kernel": "prelu",
}


def raw_name(func: Any) -> str:
    """The name a callable of torch goes by; for the getter of a tensor property, that property's name."""
    name = str(getattr(func, "__name__", type(func).__name__))
    if name == "__get__":
        return str(getattr(getattr(func, "__self__", None), "__name__", name))
    return name.split(".")[0]


def plain_name(raw: str) -> str:
    """One name for all spellings of an op.

    >>> plain_name("__iadd__"), plain_name("add_"), plain_name("__rsub__"), plain_name("bmm")
    ('add', 'add', 'sub', 'matmul')
    """
    if raw.startswith("__") and raw.endswith("__"):
        core = raw.strip("_")
        core = _REFLECTED.get(core) or _IN_PLACE.get(core) or core
    else:
        core = raw.rstrip("_") if raw.endswith("_") else raw
    return _SYNONYMS.get(core, core)


def writes_in_place(raw: str) -> bool:
    """Whether an op of this raw name changes its first argument.

    >>> writes_in_place("add_"), writes_in_place("__setitem__"), writes_in_place("__add__")
    (True, True, False)
    """
    if raw.startswith("__"):
        return raw == "__setitem__" or raw.strip("_") in _IN_PLACE
    return raw.endswith("_") and not raw.startswith("requires_grad")


def _table(groups: Mapping[str, str]) -> dict[str, str]:
    return {op: kind for kind, ops in groups.items() for op in ops.split()}


MOVES = _table(
    {
        "view": "view reshape flatten unflatten squeeze unsqueeze view_as reshape_as ravel as_strided "
        "pixel_shuffle pixel_unshuffle atleast_1d atleast_2d atleast_3d unfold",
        "transpose": "transpose permute t T mT H mH movedim moveaxis swapaxes swapdims adjoint flip roll rot90",
        "slice": "getitem narrow select split split_with_sizes unsafe_split chunk unsafe_chunk tensor_split unbind "
        "index_select gather take take_along_dim masked_select hsplit vsplit diagonal index",
        "concat": "cat concat concatenate stack hstack vstack dstack column_stack pad constant_pad_nd",
        "expand": "expand expand_as repeat repeat_interleave broadcast_to broadcast_tensors tile",
        "dropout": "dropout alpha_dropout feature_dropout feature_alpha_dropout",
        "cast": "to float half bfloat16 double type type_as",
        "clone": "clone contiguous detach alias data lift_fresh requires_grad",
        "to": "cpu cuda pin_memory",
    }
)
"""Ops that move values without changing them -> their name in `setpoint.types.PASS_THROUGH`."""

ACTIVATIONS = frozenset(
    "relu relu6 gelu silu tanh sigmoid mish softplus elu selu celu leaky_relu prelu rrelu hardswish hardsigmoid "
    "hardtanh softsign logsigmoid erf threshold glu".split()
)
"""Element-wise non-linearities that go by a name."""

ELEMENTWISE = ACTIVATIONS | frozenset(
    "add sub mul div pow rpow neg abs exp log sqrt rsqrt square clamp clip clamp_min clamp_max minimum maximum sin "
    "cos where masked_fill addcmul addcdiv lerp reciprocal expm1 log1p sign positive rdiv nan_to_num float_power "
    "true_divide floor round erfc exp2 log2 copy fill zero threshold complex view_as_complex view_as_real polar".split()
)
"""Ops whose output position depends on the same position of their inputs alone."""

REDUCTIONS = frozenset(
    "mean var std var_mean std_mean norm vector_norm linalg_vector_norm sum linalg_norm rms_norm normalize".split()
)

NORMS = {
    "layer_norm": "layer",
    "rms_norm": "rms",
    "batch_norm": "batch",
    "group_norm": "group",
    "instance_norm": "instance",
}
"""Norm ops -> `setpoint.types.NormKind`."""

POOLS = frozenset(
    "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d "
    "adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d mean".split()
)

RESAMPLES = frozenset(
    "upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d _upsample_nearest_exact2d "
    "_upsample_nearest_exact3d upsample_linear1d upsample_bilinear2d upsample_trilinear3d upsample_bicubic2d "
    "_upsample_bilinear2d_aa _upsample_bicubic2d_aa avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d "
    "adaptive_avg_pool2d adaptive_avg_pool3d".split()
)
"""Ops that average over positions, for each channel in the same way."""

CONVOLUTIONS = frozenset("conv conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d".split())

CONTRACTIONS = frozenset("linear matmul addmm baddbmm addmv einsum grouped_mm bilinear".split()) | CONVOLUTIONS
"""Ops that contract an activation with a weight (or, for attention, two activations)."""

CORES = frozenset({"scaled_dot_product_attention", "softmax"})
"""Ops that an attention runs on; see `setpoint.surgery.Anatomy.attention_calls`."""

NO_VALUE = frozenset(
    "size dim numel shape stride dtype device item tolist is_floating_point is_complex ndim storage_offset "
    "is_contiguous numpy equal allclose requires_grad grad is_cuda layout data_ptr untyped_storage nbytes itemsize "
    "get_device element_size is_nested is_quantized is_sparse is_meta is_cpu grad_fn is_leaf _version".split()
)
"""Calls that return no tensor of the network."""


def is_known(op: str) -> bool:
    """Whether the meaning of an op is known here, so that it need not be listed as unread when it takes a weight."""
    return (
        op in MOVES
        or op in ELEMENTWISE
        or op in REDUCTIONS
        or op in NORMS
        or op in POOLS
        or op in CONTRACTIONS
        or op in CORES
        or op in RESAMPLES
        or op in NO_VALUE
        or op in {"embedding", "embedding_bag", "copy", "index_put", "setitem", "alias_write", "one_hot", "amax"}
        or op in {"zeros_like", "ones_like", "empty_like", "full_like", "randn_like", "rand_like", "new_zeros"}
        or op in {"lt", "gt", "le", "ge", "eq", "ne", "argmax", "max", "min", "isnan", "isinf", "isfinite", "any"}
        or op in {"promote_types", "result_type", "is_same_size", "softmax", "logsumexp", "log_softmax", "cumsum"}
        or op.startswith(("upsample", "new_"))
    )
