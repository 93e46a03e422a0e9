"""Configurations of models whose Mamba-2 layers may differ in state size, and may project their state.

There is one class per family of transformers: the family's own configuration with two more entries. Saved models carry
a copy of this file: it imports nothing but what transformers itself needs.
"""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import (
    BambaConfig,
    FalconH1Config,
    GraniteMoeHybridConfig,
    Mamba2Config,
    NemotronHConfig,
    PreTrainedConfig,
    Zamba2Config,
)


class GhostConfig(PreTrainedConfig):  # type: ignore[misc]
    """What the configurations of all families share.

    Args:
        state_sizes: the state size n of every layer, the width of each group's B and C in in_proj and conv1d; 0 for a
            layer without a Mamba-2 mixer. None is the family's own state size in every layer.
        projected_state_sizes: the size r, 1 <= r <= n, of every layer's state after projection; 0 is a layer without
            a projection, whose state has size n. None is a model without any.
        state_tiers: of every layer, for every head two numbers: how many of its state's first channels are meant to be
            kept in 8 bits between two tokens, and how many of the next in 4; what is left of them is not kept. An empty
            list for a layer without a Mamba-2 mixer. None where all channels are kept alike. The model itself rounds
            nothing: whoever stores the state does.

    Raises:
        StrictDataclassError: a value of another type, a list whose length is not the number of layers, a size outside
            its range, or heads that don't divide into the groups. All faults of the sizes are listed.
        ValueError: a config of an earlier version, whose projections are per head.
    """

    state_sizes: list[int] | None = None
    projected_state_sizes: list[int] | None = None
    state_tiers: list[list[list[int]]] | None = None

    size_keys: ClassVar[dict[str, str]] = {
        "state_size": "mamba_d_state",
        "num_heads": "mamba_n_heads",
        "n_groups": "mamba_n_groups",
    }
    """What the family's configuration calls these sizes."""
    is_pure: ClassVar[bool] = False
    """Whether every layer has a Mamba-2 mixer."""

    def __post_init__(self, **kwargs: Any) -> None:
        by_head = kwargs.pop("projection_heads", False)  # an entry of earlier versions
        if by_head:
            raise ValueError(
                f"projection_heads is {by_head!r}: every head would have a projection of its own; expected false or no "
                "such entry, since the heads of a group share one projection"
            )
        name = type(self).__name__.removesuffix("Config")
        # A config from the hub names the repository in its own entries, which therefore win.
        kwargs["auto_map"] = {
            "AutoConfig": f"configuration_ghost.{name}Config",
            "AutoModel": f"modeling_ghost.{name}Model",
            "AutoModelForCausalLM": f"modeling_ghost.{name}ForCausalLM",
        } | (kwargs.get("auto_map") or {})
        super().__post_init__(**kwargs)

    def size(self, name: str) -> int:
        """A size under the field's name: ``state_size``, ``num_heads`` or ``n_groups``."""
        value: int = getattr(self, self.size_keys[name])
        return value

    def state_size_of(self, layer: int) -> int:
        """n, the width of B and C of each group of a layer, before any projection."""
        return self.size("state_size") if self.state_sizes is None else self.state_sizes[layer]

    def projected_state_size_of(self, layer: int) -> int | None:
        """r, the size of a layer's state after projection; None if the layer has no projection."""
        return (self.projected_state_sizes[layer] or None) if self.projected_state_sizes else None

    def recurrent_state_size_of(self, layer: int) -> int:
        """The size of the state that a layer keeps per channel of x: r if it projects, else n."""
        return self.projected_state_size_of(layer) or self.state_size_of(layer)

    def state_tiers_of(self, layer: int) -> list[list[int]] | None:
        """A layer's entry of ``state_tiers``; None if there is none."""
        return None if self.state_tiers is None else self.state_tiers[layer]

    def validate_state_sizes(self) -> None:
        """Part of the validation that ``@strict`` runs after ``__init__`` and before saving."""
        faults = []
        heads, groups = self.size("num_heads"), self.size("n_groups")
        if heads % groups:
            faults.append(f"{self.size_keys['num_heads']} is {heads}, which n_groups = {groups} does not divide")
        if self.state_sizes is None and self.size("state_size") < 1:
            faults.append(f"{self.size_keys['state_size']} is {self.size('state_size')}; expected at least 1")
        for name in ("state_sizes", "projected_state_sizes", "state_tiers"):
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
        least = 1 if self.is_pure else 0
        if n < least:
            return [f"state_sizes[{layer}] is {n}; expected at least {least}"]
        if r is not None and not 1 <= r <= n:
            return [f"projected_state_sizes[{layer}] is {r}; expected 1 to {n}, the layer's state size, or 0 for none"]
        return [] if self.state_tiers is None else self._tier_faults(layer)

    def _tier_faults(self, layer: int) -> list[str]:
        tiers, size = self.state_tiers_of(layer) or [], self.recurrent_state_size_of(layer)
        heads = self.size("num_heads") if size else 0
        if len(tiers) != heads:
            return [f"state_tiers[{layer}] is of {len(tiers)} heads; expected {heads}"]
        return [
            f"state_tiers[{layer}][{head}] is {tier}; expected two numbers of channels, at most {size} together"
            for head, tier in enumerate(tiers)
            if len(tier) != 2 or min(tier) < 0 or sum(tier) > size
        ]


@strict
class GhostMamba2Config(GhostConfig, Mamba2Config):  # type: ignore[misc]
    model_type = "ghost_mamba2"
    size_keys: ClassVar[dict[str, str]] = {"state_size": "state_size", "num_heads": "num_heads", "n_groups": "n_groups"}
    is_pure: ClassVar[bool] = True


@strict
class GhostBambaConfig(GhostConfig, BambaConfig):  # type: ignore[misc]
    model_type = "ghost_bamba"


@strict
class GhostFalconH1Config(GhostConfig, FalconH1Config):  # type: ignore[misc]
    model_type = "ghost_falcon_h1"


@strict
class GhostGraniteMoeHybridConfig(GhostConfig, GraniteMoeHybridConfig):  # type: ignore[misc]
    model_type = "ghost_granitemoehybrid"


@strict
class GhostNemotronHConfig(GhostConfig, NemotronHConfig):  # type: ignore[misc]
    model_type = "ghost_nemotron_h"
    size_keys: ClassVar[dict[str, str]] = {
        "state_size": "ssm_state_size",
        "num_heads": "mamba_num_heads",
        "n_groups": "n_groups",
    }


@strict
class GhostZamba2Config(GhostConfig, Zamba2Config):  # type: ignore[misc]
    model_type = "ghost_zamba2"
    size_keys: ClassVar[dict[str, str]] = {
        "state_size": "mamba_d_state",
        "num_heads": "n_mamba_heads",
        "n_groups": "mamba_ngroups",
    }
