"""The `quantization_config` of a checkpoint: which block size its fp8 weights have, or that it cannot be read."""

from __future__ import annotations

from llm_engine.models.config_keys import ConfigKeys


def fp8_block_size(keys: ConfigKeys) -> tuple[int, int] | None:
    """Rows and columns of a block of fp8 weights; None when the weights are not quantised. Raises ConfigError.

    Reads the family's own spelling (`quant_method` fp8) and compressed-tensors with block-wise fp8 weights.
    """
    quant = keys.section("quantization_config")
    if quant is None:
        return None
    if quant.choice("quant_method", ("fp8", "compressed-tensors")) == "fp8":
        quant.choice("fmt", ("e4m3",), "e4m3")
        return _pair(quant, "weight_block_size")
    groups = quant.section("config_groups")
    if groups is None:
        raise quant.error("config_groups", None, "an object")
    sizes = {_group_block(groups, name) for name in groups.names()}
    if len(sizes) != 1:
        raise quant.error("config_groups", sorted(sizes), "groups that share one block size")
    return sizes.pop()


def _group_block(groups: ConfigKeys, name: str) -> tuple[int, int]:
    group = groups.section(name)
    weights = group.section("weights") if group is not None else None
    if weights is None:
        raise groups.error(name, groups.raw(name), "an object with weights")
    weights.choice("type", ("float",))
    weights.choice("num_bits", (8,))
    weights.choice("strategy", ("block",))
    return _pair(weights, "block_structure")


def _pair(keys: ConfigKeys, name: str) -> tuple[int, int]:
    value = keys.raw(name)
    if not (isinstance(value, list) and len(value) == 2 and all(isinstance(n, int) and n > 0 for n in value)):
        raise keys.error(name, value, "two positive integers")
    return int(value[0]), int(value[1])
