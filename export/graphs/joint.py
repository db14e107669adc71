"""An image as a whole in the space of CLIP's text tower: what IVTP compares words with."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from patchsieve.contract.errors import UnsupportedModelError
from patchsieve.contract.model import VisionModel
from patchsieve.export.families.specs import TowerSpec
from patchsieve.export.graphs.layers import Linear
from patchsieve.export.graphs.vision import TowerLayer
from patchsieve.export.source.checkpoint import Checkpoint
from patchsieve.export.source.clip import ClipSource
from patchsieve.export.weights import Weight
from patchsieve.pruning.encoder.walk import Walk


class JointCls(nn.Module):
    """visual_projection(post_layernorm(CLS)), as CLIP makes its image embedding.

    The paper leaves open: that space begins after the tower's last layer, which a LLaVA does not
    run. By default that layer runs here, on the rows that are left; or it is left out.

    Args:
        facts: The tower's measures.
        width: Of the joint space, E.
        has_last: Run the layers after those that the projector reads.
    """

    def __init__(self, facts: VisionModel, width: int, *, has_last: bool = True) -> None:
        super().__init__()
        spec = TowerSpec.of_facts(facts)
        further = range(facts.num_layers_run, facts.num_layers) if has_last else ()
        self.layers = nn.ModuleDict({str(index): TowerLayer(spec) for index in further})
        self.post_layernorm = nn.LayerNorm(spec.hidden_size, eps=spec.norm_eps)
        self.visual_projection = Linear(spec.hidden_size, width, bias=False)

    def forward(self, rows: Tensor, walk: Walk) -> Tensor:
        """Rows after the last layer that the projector reads, [B, n, C] -> float32 [B, E]."""
        for index, layer in self.layers.items():
            rows = cast(TowerLayer, layer)(rows, int(index), walk)
        return self.visual_projection(self.post_layernorm(rows[:, 0])).float()


class JointWeights:
    """Weights of `JointCls`: the checkpoint's own tower as far as it is stored, else CLIP's.

    Args:
        checkpoint: The LLaVA model.
        clip: The CLIP model, which alone has the projection.
    """

    def __init__(self, checkpoint: Checkpoint, clip: ClipSource) -> None:
        self.checkpoint, self.clip = checkpoint, clip

    def read(self, name: str) -> Tensor:
        """Read one tensor."""
        place, name = self._place(name)
        return (self.checkpoint if place == "checkpoint" else self.clip.tensors).read(name)

    def require(self, weights: list[Weight]) -> None:
        """Refuse a CLIP whose image tower is not that of the model.

        Raises:
            UnsupportedModelError: A tensor is missing or of another shape.
        """
        by_place: dict[str, dict[str, tuple[int, ...]]] = {"checkpoint": {}, "clip": {}}
        for weight in weights:
            place, name = self._place(weight.source)
            by_place[place][name] = weight.source_shape
        self.checkpoint.require(by_place["checkpoint"])
        try:
            self.clip.tensors.require(by_place["clip"], f"the scorer {self.clip.name}")
        except UnsupportedModelError as error:
            raise UnsupportedModelError(
                "the scorer's image tower is not the one that this model has",
                found=str(error),
                do="give the CLIP that the model's tower was taken from, such as "
                "openai/clip-vit-large-patch14-336 for LLaVA-1.5",
            ) from error

    def _place(self, name: str) -> tuple[str, str]:
        """Whose tensor a weight is, and what it is called there."""
        if name.startswith("visual_projection."):
            return "clip", name
        inner = f"encoder.{name}" if name.startswith("layers.") else name
        own = f"vision_tower.{inner}"
        return ("checkpoint", own) if own in self.checkpoint else ("clip", f"vision_model.{inner}")
