"""From the tensors of one module of a LoRA file to its delta: which algorithm they are of, and whether they fit.

Tensors come by kind (``down``, ``hada_w1_a`` …), whatever their names in the file. Each kind belongs to one algorithm.
What is wrong is a ``ValueError`` without file and module, which the caller knows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from .lora import Delta
from .lora_algorithms import Dora, Full, Generalised, Hadamard, Kronecker, LowRank, Orthogonal, Replacement

# Kind -> its name in messages, where files have another.
NAMES = {"down": "lora_down (lora_A)", "up": "lora_up (lora_B)", "magnitude": "dora_scale"}

# Kinds of factors of convolutions, of which Flux has none where LoRAs act.
TUCKER = ("mid", "hada_t1", "hada_t2", "lokr_t2")


@dataclass(frozen=True)
class Options:
    """Where the reference and the intent of a file differ.

    Attributes:
        exact_dora: DoRA measures the rows of W + dW, as in training, and not those of W.
        squared_turns: OFT and BOFT at strength s act with s².
    """

    exact_dora: bool = False
    squared_turns: bool = False


@dataclass(frozen=True, eq=False)
class ModuleTensors:
    """The tensors of one module by kind.

    Attributes:
        shape: of the rows of the weight that the module stands for.
        scale: rank to the factor of a plain LoRA that has no alpha of its own.
    """

    tensors: Mapping[str, Tensor]
    shape: tuple[int, ...]
    scale: Callable[[int], float] = lambda rank: 1.0
    options: Options = Options()

    def __getitem__(self, kind: str) -> Tensor:
        """
        Raises:
            ValueError: the file lacks it.
        """
        if kind not in self.tensors:
            raise ValueError(f"{NAMES.get(kind, kind)} is missing")
        return self.tensors[kind]

    def matrix(self, kind: str) -> Tensor:
        """The tensor as a matrix; that of a 1 x 1 convolution without its last axes.

        Raises:
            ValueError: the file lacks it, or it is none.
        """
        tensor = self[kind]
        if tensor.dim() < 2 or tensor.shape[2:].numel() != 1:
            raise ValueError(f"{NAMES.get(kind, kind)} {list(tensor.shape)} is no matrix")
        return tensor.flatten(1)

    @property
    def alpha(self) -> float | None:
        if "alpha" not in self.tensors:
            return None
        alpha = self.tensors["alpha"]
        if alpha.numel() != 1:
            raise ValueError(f"alpha {list(alpha.shape)} is not one number")
        return float(alpha.float())

    def factor(self, rank: int) -> float:
        """What the product of factors of this rank is multiplied with."""
        return 1.0 if self.alpha is None else self.alpha / max(rank, 1)


def _lora(module: ModuleTensors) -> Delta:
    down, up = module.matrix("down"), module.matrix("up")
    rank = len(down)
    return LowRank(down, up, module.scale(rank) if module.alpha is None else module.factor(rank))


def _loha(module: ModuleTensors) -> Delta:
    first, second = ((module.matrix(f"hada_w{n}_a"), module.matrix(f"hada_w{n}_b")) for n in (1, 2))
    return Hadamard((first, second), module.factor(len(first[1])))


def _lokr(module: ModuleTensors) -> Delta:
    first, second = (_whole_or_factors(module, f"lokr_w{n}") for n in (1, 2))
    # Without factors there is no rank, and files then carry an alpha that means nothing, often a huge one.
    ranks = [len(factors[1]) for factors in (second, first) if len(factors) == 2]
    return Kronecker(first, second, module.factor(ranks[0]) if ranks else 1.0)


def _whole_or_factors(module: ModuleTensors, name: str) -> tuple[Tensor, ...]:
    factored = f"{name}_a" in module.tensors or f"{name}_b" in module.tensors
    if factored and name in module.tensors:
        raise ValueError(f"{name} is given whole and as factors")
    return tuple(module.matrix(kind) for kind in ((f"{name}_a", f"{name}_b") if factored else (name,)))


def _glora(module: ModuleTensors) -> Delta:
    """Today's orientation; that of old files, in which all four are transposed and exchanged, is brought to it."""
    a1, a2, b1, b2 = (module.matrix(kind) for kind in ("a1", "a2", "b1", "b2"))
    rows, width = module.shape
    if (b1.shape[0], b2.shape[-1], a1.shape[0]) != (rows, width, width):
        a1, a2, b1, b2 = a2, a1, b2, b1
    return Generalised((a1, a2), (b1, b2), module.factor(len(a2)))


def _oft(module: ModuleTensors) -> Delta:
    options, limit = module.options, module.alpha or 0.0
    return Orthogonal(
        module["oft_blocks"], module.shape[-1], limit, module.tensors.get("rescale"), options.squared_turns
    )


# Kinds of an algorithm's tensors -> what makes a delta of them.
_ALGORITHMS: tuple[tuple[tuple[str, ...], Callable[[ModuleTensors], Delta]], ...] = (
    (("down", "up"), _lora),
    (tuple(f"hada_w{n}_{x}" for n in (1, 2) for x in "ab"), _loha),
    (tuple(f"lokr_w{n}{x}" for n in (1, 2) for x in ("", "_a", "_b")), _lokr),
    (("a1", "a2", "b1", "b2"), _glora),
    (("oft_blocks", "rescale"), _oft),
    (("diff",), lambda module: Full(module["diff"])),
    (("set_weight",), lambda module: Replacement(module["set_weight"])),
)


def weight_deltas(module: ModuleTensors) -> list[Delta]:
    """What the module does to its weight; several where a file has, say, factors and a difference; none for a bias.

    Raises:
        ValueError: a tensor is missing, or shapes fit neither one another nor the weight.
    """
    builders = [build for kinds, build in _ALGORITHMS if any(kind in module.tensors for kind in kinds)]
    if builders and len(module.shape) != 2 and not {"diff", "set_weight"} & set(module.tensors):
        raise ValueError(f"its factors stand for a matrix, and the parameter has the shape {list(module.shape)}")
    deltas = [build(module) for build in builders]
    if "magnitude" not in module.tensors:
        return deltas
    if len(deltas) != 1 or isinstance(deltas[0], Full | Replacement):
        raise ValueError("dora_scale belongs to one set of factors")
    return [Dora(deltas[0], _magnitude(module, deltas[0]), module.options.exact_dora)]


def _magnitude(module: ModuleTensors, delta: Delta) -> Tensor:
    """[out, 1] or [1, in]; peft has a vector of the rows."""
    magnitude = module["magnitude"]
    by_rows = magnitude.dim() > 0 and magnitude.shape[0] == magnitude.numel() == delta.shape[0]
    return magnitude.reshape(-1, 1) if by_rows else magnitude


def bias_delta(module: ModuleTensors) -> Delta | None:
    """What the module adds to its bias."""
    return Full(module["diff_b"]) if "diff_b" in module.tensors else None
