"""What the frozen base takes of a device's memory, by formula: for shapes of which there is no model to run."""

from __future__ import annotations

from meft_engine.planner.model_shape import ModelShape


def base_bytes_needed(model: ModelShape, tokens: int, *, keeps_inputs: bool = False) -> dict[str, int]:
    """Bytes of device memory that a frozen base in bf16 takes in a forward and backward, without checkpointing.

    Counted is what autograd keeps of a layer of the Llama family where weights need no gradient: fp32 inputs of both
    norms, queries, keys, values, output and log-sum of attention, gate (before and after its activation) and up
    projection; what an adapter keeps besides, its input; and at the end the norm, logits and their gradient, in bf16
    and in fp32. Attention must be one that forms no matrix of scores.

    Args:
        tokens: of a micro-batch.
        keeps_inputs: under ZeRO stage 3, whose linear layers keep their inputs too: those of queries, keys and values,
            of the down projection and of the head. That of gate and up projection is the adapter's.
    """
    of_layer = 2 * 4 * model.width + 4 * 2 * model.width + 3 * 2 * model.intermediate + 2 * model.width
    of_end = _of_end(model)
    if keeps_inputs:
        of_layer, of_end = of_layer + 2 * model.width + 2 * model.intermediate, of_end + 2 * model.width
    return {
        "base": 2 * model.parameters,
        "activations": tokens * (model.layers * of_layer + of_end),
    }


def checkpointed_bytes(model: ModelShape, tokens: int, *, keeps_inputs: bool = False) -> int:
    """The same activations where each layer is computed again in the backward: the inputs of all, and one whole."""
    whole = base_bytes_needed(model, tokens, keeps_inputs=keeps_inputs)["activations"]
    end = tokens * _of_end(model)
    return tokens * model.layers * 2 * model.width + end + (whole - end) // model.layers


def _of_end(model: ModelShape) -> int:
    return 4 * model.width + (2 + 4 + 4 + 2) * model.vocabulary
