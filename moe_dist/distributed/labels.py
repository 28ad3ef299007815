"""Labels for collectives: the place in the model, and the data's direction.

A layer's all-to-all has the layer's name as its place ("middle", "encoder.ffn.moe0"). Its
directions are "counts", "dispatch" and "combine" in forward, "dispatch_backward" and
"combine_backward" in backward. Other calls:

    place        direction             data
    NAME         rows                  touched rows of the vocabulary matrix NAME
    experts      gradients, weights    expert parameters, between replicas of an expert shard
    DeepSpeed    all_reduce, ...       dense parameters, by the name of DeepSpeed's method
    all ranks    sum, gather           everything else
"""

from typing import NamedTuple


class CommLabel(NamedTuple):
    """A name for a collective in the flight recorder and in the byte counts.

    Attributes:
        place: Name of the layer, module or parameter kind.
        direction: The data's kind and direction.
        layer_call: Index of the call within the forward pass, for layers
            (`TokenContext.layer_call`). A layer shared by several blocks has several calls
            and one place.
    """

    place: str
    direction: str
    layer_call: int | None = None

    def backward(self) -> "CommLabel":
        """Returns the label for the same call's gradient."""
        return self._replace(direction=f"{self.direction}_backward")

    def describe(self) -> str:
        """Returns "DIRECTION of PLACE", with the layer call if there is one."""
        call = "" if self.layer_call is None else f" (layer call {self.layer_call})"
        return f"{self.direction} of {self.place}{call}"


class TrafficKey(NamedTuple):
    """A key in the byte counts.

    One layer's calls add up, and links between nodes are counted separately.

    Attributes:
        place: As in `CommLabel`.
        direction: As in `CommLabel`.
        inter_node: True for bytes sent to another node.
    """

    place: str
    direction: str
    inter_node: bool
