"""Configuration of Mamba-2 models with per-layer state sizes and projected states.

Saved models carry a copy of this file: it imports nothing but what transformers itself needs.
"""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import Mamba2Config


@strict
class GhostMamba2Config(Mamba2Config):  # type: ignore[misc]
    """A ``Mamba2Config`` whose layers may differ in state size, and may project their state to fewer channels.

    Args:
        state_sizes: the state size n of every layer, the width of each group's B and C in in_proj and conv1d;
            None is ``state_size`` in every layer.
        projected_state_sizes: the size r, 1 <= r <= n, of every layer's state after projection; 0 is a layer without
            a projection, whose state has size n. None is a model without any.

    Raises:
        StrictDataclassError: a value of another type, a list whose length is not the number of layers, a size outside
            its range, or heads that don't divide into the groups. All faults of the sizes are listed.
        ValueError: a config of an earlier version, whose projections are per head.
    """

    model_type = "ghost_mamba2"

    state_sizes: list[int] | None = None
    projected_state_sizes: list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        by_head = kwargs.pop("projection_heads", False)  # an entry of earlier versions
        if by_head:
            raise ValueError(
                f"projection_heads is {by_head!r}: every head would have a projection of its own; expected false or no "
                "such entry, since the heads of a group share one projection"
            )
        # A config from the hub names the repository in its own entries, which therefore win.
        kwargs["auto_map"] = {
            "AutoConfig": "configuration_ghost_mamba2.GhostMamba2Config",
            "AutoModel": "modeling_ghost_mamba2.GhostMamba2Model",
            "AutoModelForCausalLM": "modeling_ghost_mamba2.GhostMamba2ForCausalLM",
        } | (kwargs.get("auto_map") or {})
        super().__post_init__(**kwargs)

    def state_size_of(self, layer: int) -> int:
        """n, the width of B and C of each group of a layer, before any projection."""
        size: int = self.state_size if self.state_sizes is None else self.state_sizes[layer]
        return size

    def projected_state_size_of(self, layer: int) -> int | None:
        """r, the size of a layer's state after projection; None if the layer has no projection."""
        return (self.projected_state_sizes[layer] or None) if self.projected_state_sizes else None

    def recurrent_state_size_of(self, layer: int) -> int:
        """The size of the state that a layer keeps per channel of x: r if it projects, else n."""
        return self.projected_state_size_of(layer) or self.state_size_of(layer)

    def validate_state_sizes(self) -> None:
        """Part of the validation that ``@strict`` runs after ``__init__`` and before saving."""
        faults = []
        if self.num_heads % self.n_groups:
            faults.append(f"num_heads is {self.num_heads}, which n_groups = {self.n_groups} does not divide")
        if self.state_sizes is None and self.state_size < 1:
            faults.append(f"state_size is {self.state_size}; expected at least 1")
        for name in ("state_sizes", "projected_state_sizes"):
            sizes = getattr(self, name)
            if sizes is not None and len(sizes) != self.num_hidden_layers:
                faults.append(f"{name} has {len(sizes)} entries; expected num_hidden_layers = {self.num_hidden_layers}")
        if not faults:
            for layer in range(self.num_hidden_layers):
                faults += self._layer_faults(layer)
        if faults:
            raise ValueError("; ".join(faults) + ".")

    def _layer_faults(self, layer: int) -> list[str]:
        n, r = self.state_size_of(layer), self.projected_state_size_of(layer)
        if n < 1:
            return [f"state_sizes[{layer}] is {n}; expected at least 1"]
        if r is not None and not 1 <= r <= n:
            return [f"projected_state_sizes[{layer}] is {r}; expected 1 to {n}, the layer's state size, or 0 for none"]
        return []


__all__ = ["GhostMamba2Config"]
