"""The operations that an uploaded loss may use, by the names that torch.fx writes. No torch.

None of them draws random numbers, writes into its operands, or accesses anything but its operands.
`training/graph_bounds` bounds the size of each result before it is computed: at most as many values
as the operands hold or broadcast to, except for the operations that have a rule there.
"""

from __future__ import annotations

__all__ = ["ATTRIBUTES", "FUNCTIONS", "METHODS", "TORCH_CONSTANTS"]

_ELEMENTWISE = """
abs absolute neg negative positive exp exp2 expm1 log log2 log10 log1p logaddexp logaddexp2 sqrt
rsqrt square pow reciprocal sigmoid logit tanh sinh cosh sin cos tan asin acos atan atan2 asinh
acosh atanh arctan arctan2 erf erfc erfinv lgamma digamma add sub subtract mul multiply div divide
true_divide floor_divide remainder fmod maximum minimum fmax fmin clamp clamp_min clamp_max clip eq
ne lt le gt ge less less_equal greater greater_equal not_equal isclose logical_and logical_or
logical_not logical_xor isnan isinf isfinite isposinf isneginf nan_to_num sign sgn round floor ceil
trunc fix frac lerp addcmul addcdiv hypot xlogy copysign heaviside rad2deg deg2rad where
bitwise_and bitwise_or bitwise_not bitwise_xor masked_fill relu softmax log_softmax cumsum cumprod
cummax cummin logcumsumexp flip roll sort argsort detach clone
""".split()
_SHRINKING = """
sum nansum mean nanmean prod std var max min amax amin aminmax argmax argmin any all count_nonzero
logsumexp norm median nanmedian mode numel gather take take_along_dim index_select masked_select
topk kthvalue squeeze unsqueeze reshape flatten ravel unflatten transpose permute swapaxes movedim
t unbind split chunk narrow select diff tril triu diagonal cosine_similarity
""".split()
_SIZED = """
zeros ones full arange zeros_like ones_like full_like cat concat stack hstack vstack outer
dot matmul mm mv vdot broadcast_to tile
""".split()
_METHODS_ONLY = """
size dim ndimension view view_as reshape_as type_as to float double half bfloat16 long int bool
contiguous expand expand_as repeat new_zeros new_ones new_full
""".split()
_FUNCTIONAL = """
relu silu elu leaky_relu selu relu6 hardtanh softsign tanh sigmoid logsigmoid softmax log_softmax
mse_loss l1_loss smooth_l1_loss huber_loss kl_div binary_cross_entropy
binary_cross_entropy_with_logits normalize pad tanhshrink softmin threshold
""".split()
_COMPILED = """
_nn.log_sigmoid _nn.softplus _nn.gelu _nn.one_hot _special.special_expit _special.special_logit
_special.special_xlogy _special.special_xlog1py _special.special_entr _special.special_erf
_special.special_log1p _special.special_expm1 _special.special_log_softmax
_special.special_softmax _special.special_logsumexp _special.special_log_ndtr
_special.special_ndtr _linalg.linalg_norm _linalg.linalg_vector_norm
""".split()
_OPERATORS = """
add sub mul truediv floordiv mod pow neg pos abs eq ne lt le gt ge and_ or_ xor invert getitem
matmul
""".split()
_MATH = """
sqrt exp log log2 log10 log1p expm1 floor ceil trunc fabs pow tanh sin cos atan isnan isinf isfinite
""".split()
_NOT_FUNCTIONS = {"mode"}
_NOT_METHODS = {"zeros", "ones", "full", "arange", "zeros_like", "ones_like", "full_like", "cat"}
_NOT_METHODS |= {"concat", "stack", "hstack", "vstack", "relu_", "where_", "cosine_similarity"}

FUNCTIONS: frozenset[str] = frozenset(
    [
        f"torch.{name}"
        for name in (*_ELEMENTWISE, *_SHRINKING, *_SIZED)
        if name not in _NOT_FUNCTIONS
    ]
    + [f"torch.nn.functional.{name}" for name in _FUNCTIONAL]
    + [f"torch._C.{name}" for name in _COMPILED]
    + [f"operator.{name}" for name in _OPERATORS]
    + [f"math.{name}" for name in _MATH]
)
METHODS: frozenset[str] = frozenset(
    name
    for name in (*_ELEMENTWISE, *_SHRINKING, *_SIZED, *_METHODS_ONLY)
    if name not in _NOT_METHODS
)
ATTRIBUTES = ("shape", "ndim", "dtype", "device", "T", "mT", "values", "indices")
TORCH_CONSTANTS: dict[str, tuple[str, ...]] = {
    "dtype": ("float32", "float64", "float16", "bfloat16", "int64", "int32", "bool"),
    "device": ("cpu",),
    "layout": ("strided",),
    "memory_format": ("contiguous_format", "preserve_format"),
}
