"""The structs of `native/decode_kernels.c`, field by field; the C source explains them.

Their sizes are compared when a decoder is created.
"""

from __future__ import annotations

import ctypes

__all__ = [
    "STRUCTS",
    "BatchArguments",
    "Group",
    "Layer",
    "Linear",
    "Long",
    "Lora",
    "Model",
    "Pointer",
]

Pointer = ctypes.c_void_p
Long = ctypes.c_int64


class Linear(ctypes.Structure):
    _fields_ = (
        ("weight", Pointer),
        ("bias", Pointer),
        ("half", Long),
        ("bits", Long),
        ("in_features", Long),
        ("out_features", Long),
        ("num_modules", Long),
        ("module_out", Long * 3),
    )


class Lora(ctypes.Structure):
    _fields_ = (("a", Pointer), ("b", Pointer * 3), ("a_bits", Long))


class Layer(ctypes.Structure):
    _fields_ = (
        ("qkv", Linear),
        ("o", Linear),
        ("gate_up", Linear),
        ("down", Linear),
        ("input_norm", Pointer),
        ("post_norm", Pointer),
        ("q_norm", Pointer),
        ("k_norm", Pointer),
    )


class Model(ctypes.Structure):
    _fields_ = (
        ("num_layers", Long),
        ("hidden", Long),
        ("heads", Long),
        ("kv_heads", Long),
        ("head_dim", Long),
        ("inner", Long),
        ("eps", ctypes.c_float),
        ("layers", ctypes.POINTER(Layer)),
        ("final_norm", Pointer),
        ("head", Linear),
    )


class Group(ctypes.Structure):
    _fields_ = (
        ("first", Long),
        ("count", Long),
        ("rank", Long),
        ("scale", ctypes.c_float),
        ("projections", ctypes.POINTER(Lora)),
    )


class BatchArguments(ctypes.Structure):
    _fields_ = (
        ("num_tokens", Long),
        ("num_groups", Long),
        ("num_threads", Long),
        ("max_position", Long),
        ("order", Pointer),
        ("group_of", Pointer),
        ("groups", ctypes.POINTER(Group)),
        ("positions", Pointer),
        ("num_spans", Long),
        ("spans", Pointer),
        ("kv", Pointer),
        ("kv_stride", Pointer),
        ("capacity", Pointer),
        ("same_as", Pointer),
        ("same_length", Pointer),
        ("cos", Pointer),
        ("sin", Pointer),
        ("x", Pointer),
        ("normed", Pointer),
        ("wide", Pointer),
        ("act", Pointer),
        ("low", Pointer),
        ("low_rounded", Pointer),
        ("expanded", Pointer),
        ("expanded_size", Long),
        ("scores", Pointer),
    )


STRUCTS = (Linear, Lora, Layer, Model, Group, BatchArguments)
"""In the order of `struct_size` in C."""
