"""What a checkpoint is, from its config and file headers: no weights are loaded."""

from __future__ import annotations

from dataclasses import dataclass

from ghostssm.checkpoint.loading import empty_model, model_config
from ghostssm.checkpoint.source import find_source
from ghostssm.families import family_of
from ghostssm.layout import SSDLayout


@dataclass(frozen=True)
class Description:
    """The sizes of a model, and the memory that one sequence needs while it is decoded.

    Attributes:
        layers: mixers with a recurrent state.
        parameters: of the whole model, shared ones counted once.
    """

    name: str
    dialect: str
    family: str
    layers: int
    layout: SSDLayout
    vocab_size: int
    parameters: int

    def state_bytes(self, state_size: int | None = None, bytes_per_number: int = 4) -> int:
        """Bytes of recurrent state per sequence, over all layers; of the model as it is, or cut to a state size."""
        layout = self.layout if state_size is None else self.layout.with_state_size(state_size)
        return self.layers * layout.state_numbers * bytes_per_number

    def removed_parameters(self, state_size: int) -> int:
        """Parameters of in_proj and conv1d that a cut to ``state_size`` takes away (biases not counted)."""
        channels = self.layout.conv_dim - self.layout.with_state_size(state_size).conv_dim
        return self.layers * channels * (self.layout.hidden_size + self.layout.conv_kernel)


def describe(spec: str) -> Description:
    """Describe a model; arguments and errors as :func:`ghostssm.load` has them."""
    source = find_source(spec, weights=False)
    config = model_config(source)
    model = empty_model(config)
    family = family_of(config)
    mixers = [family.mixer(config, block, index) for index, block in enumerate(family.blocks(model))]
    return Description(
        name=spec,
        dialect=source.dialect,
        family=family.model_type,
        layers=sum(mixer is not None for mixer in mixers),
        layout=family.layout(config),
        vocab_size=config.vocab_size,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
    )
