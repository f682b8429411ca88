"""How other projects name a drafter's tensors.

Sources: EAGLE-1/2 ``eagle/model/cnets1.py``, which HASS shares; the PRISM artifact's ``stepModels`` and ``stepFCs``;
the models ``llama_ld.py`` and ``llama_prism.py`` of its SGLang. All call what fuses several hidden states fusion_layer.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

from prism_trt.errors import PrismError

_OURS = re.compile(r"modules_\.(?P<module>\d+)\.(?:fc|layers\.(?P<layer>\d+))\.(?P<rest>.+)")
_EAGLE_3 = re.compile(
    r"d2t|t2d|(?:midlayer|layers\.0|midlayer\.\d+|stepModels\.\d+\.0)\.(?:hidden_norm|input_layernorm)\.weight"
)
"""Tensors of EAGLE-3: a mapped vocabulary, and norms in front of the first layer."""


@dataclass(frozen=True)
class Layout:
    """Names of the tensors of one file format."""

    name: str
    layer: str
    """Prefix of a transformer layer, of {module} and {layer}."""
    fc: str
    """Prefix of a module's fc, of {module}."""

    def translate(self, ours: str) -> str:
        """The name here of the tensor that `Drafter.state_dict` calls `ours`."""
        if found := _OURS.fullmatch(ours):
            prefix = self.fc if found["layer"] is None else self.layer
            return f"{prefix.format(**found.groupdict())}.{found['rest']}"
        return ours.replace("fusion.", "fusion_layer.", 1)

    def count_modules(self, names: Collection[str]) -> int:
        """Processing modules in a file of tensors `names`."""
        return _count(names, {f"{self.fc.format(module=module)}.weight" for module in range(len(names))})

    def count_layers(self, names: Collection[str]) -> int:
        """Transformer layers of module 0 in a file of tensors `names`."""
        prefixes = {self.layer.format(module=0, layer=layer) for layer in range(len(names))}
        return _count(names, {f"{prefix}.self_attn.q_proj.weight" for prefix in prefixes})


EAGLE = Layout("eagle", layer="layers.{layer}", fc="fc")
PRISM = Layout("prism", layer="stepModels.{module}.{layer}", fc="stepFCs.{module}")
SGLANG = Layout("sglang", layer="midlayer.{module}", fc="fc{module}")


def recognise(names: Collection[str], source: str) -> Layout:
    """The layout of a file that holds tensors `names`.

    Raises:
        PrismError: naming `source` and the tensor that makes it an EAGLE-3 drafter, or saying that it holds no drafter.
    """
    if stranger := next(filter(_EAGLE_3.fullmatch, sorted(names)), None):
        raise PrismError(
            f"{source} holds {stranger}, so it is an EAGLE-3 drafter, which is another architecture: pass one of "
            "EAGLE-1/2, HASS or PRISM"
        )
    for layout in (PRISM, SGLANG, EAGLE):  # PRISM's files have EAGLE's names as well
        if layout.count_modules(names) and layout.count_layers(names):
            return layout
    raise PrismError(
        f"{source} holds no drafter of EAGLE-1/2, HASS or PRISM (its first tensor is {min(names, default='missing')}): "
        "pass the directory of one"
    )


def _count(names: Collection[str], wanted: set[str]) -> int:
    return sum(name in names for name in wanted)
