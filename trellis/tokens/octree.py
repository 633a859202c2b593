"""The octree form: which blocks of the lattice hold something, from the whole to single tokens, and the codes there.

It needs a tokenizer with an empty code, whose id 0 says that a token's part of the grid has no voxel. Its *nodes* are
blocks of the lattice. The root, at level 0, is the smallest cube around the lattice whose side is a power of two; each
level halves the side; a leaf, at level `Octree.depth`, is a token. A *mask* tells which of a node's eight children hold
something (Meagher, Geometric modeling using octree encoding, 1982). Only nodes that hold something are written: first
the root's mask, and so on to the leaves, which have their Q codes in place of a mask. An object without a single voxel
is the sequence of no values.

Child 4·dx + 2·dy + dz of a node is the one in its lower (0) or upper (1) half along x, y and z. Bit 4·dx + 2·dy + dz of
the mask, with 2^bit as its value, tells of it; so children follow one another in Morton order. Children outside the
lattice do not exist.

*Values* number codes and masks together: codes keep their ids 1 to K - 1, mask m from 1 to 255 is K + m - 1. That makes
K + 255, the 0 that never occurs among them.

Axes: X' Y' Z' the lattice of tokens, L = X'·Y'·Z', Q codes per token, T = L·Q ids of an object, K codes, the empty one
among them.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from ..evaluation.metrics import octree_masks
from ..utils.errors import ConfigError, DataError
from .problems import Parsed, Problem, further, integers, parsed
from .sparse import morton_keys

Order = Literal["breadth", "depth"]
MASKS = 255  # of a node
# For each mask, its children, and the half of each, 0 or 1, along x, y and z.
CHILDREN = [[c for c in range(8) if mask >> c & 1] for mask in range(MASKS + 1)]
HALVES = [[(c >> 2, c >> 1 & 1, c & 1) for c in children] for children in CHILDREN]
LOWER_X, LOWER_Y, LOWER_Z = 0x0F, 0x33, 0x55  # masks of the four children in the lower half along an axis


class Node(NamedTuple):
    """A block of the lattice, of 2^(depth - level) tokens along each axis."""

    level: int  # 0 the root, depth a leaf
    x: int  # of its lowest corner, in tokens; likewise y and z
    y: int
    z: int


class Expected(NamedTuple):
    """What may come next in a sequence."""

    kind: Literal["mask", "code", "end"]
    children: int  # the children that exist, as a mask; the next one must have no other bit. 0 unless kind is "mask"
    may_end: bool  # whether the sequence may end here: if it is complete, and at its very start


class Lengths(NamedTuple):
    """Numbers of values of objects: [B] int64, or integers for one object."""

    masks: np.ndarray
    codes: np.ndarray


@dataclass(frozen=True)
class Octree:
    """The octree form of a tokenizer's ids.

    Raise ConfigError for a lattice, a number of codes or an order that there is not.
    """

    lattice: tuple[int, int, int]  # X' Y' Z', of any sizes
    n_embed: int  # K
    codes_per_token: int = 1  # Q
    # "breadth": all masks of a level before those of the next, all codes last.
    # "depth": after a node, everything in its first child, then in the next; codes right after the mask above them.
    order: Order = "breadth"

    def __post_init__(self):
        if len(self.lattice) != 3 or min(self.lattice) < 1:
            raise ConfigError(f"lattice is {self.lattice}; it must be three whole numbers of at least 1")
        if self.n_embed < 2 or self.codes_per_token < 1:
            raise ConfigError(
                "an octree needs n_embed >= 2, as id 0 means empty, and codes_per_token >= 1; they are "
                f"{self.n_embed} and {self.codes_per_token}"
            )
        if self.order not in get_args(Order):
            raise ConfigError(f"order is {self.order!r}; it must be {' or '.join(get_args(Order))}")

    @cached_property
    def depth(self) -> int:
        """The level of the leaves; the root's cube has 2^depth tokens along each axis."""
        return (max(self.lattice) - 1).bit_length()

    @property
    def num_tokens(self) -> int:
        """T, ids of an object."""
        return int(np.prod(self.lattice)) * self.codes_per_token

    def mask(self, value: int) -> int:
        """Return the mask that a value stands for, 1 to 255; 0 if it is none."""
        mask = value - self.n_embed + 1
        return mask if 0 < mask <= MASKS else 0

    def lengths(self, ids: Sequence[int] | np.ndarray | Tensor) -> Lengths:
        """Return how many masks and codes the sequences of objects have, without making them.

        ids: [T] or [B, T]. Errors: as in `to_values`.
        """
        tokens = self._tokens(ids)
        holds = (tokens[..., 0] > 0).reshape(-1, *self.lattice)
        masks = octree_masks(torch.from_numpy(holds)).sum(1).numpy()
        codes = holds.sum((1, 2, 3)) * self.codes_per_token
        return Lengths(*(counts.reshape(tokens.shape[:-2])[()] for counts in (masks, codes)))

    def to_values(self, ids: Sequence[int] | np.ndarray | Tensor) -> Tensor:
        """Return the sequence of an object, int64 [n] in [1, K + 255).

        ids: [T], in order of the lattice's x, y, z with z fastest, a token's Q codes one after another; 0 where it is
            empty.
        Raise DataError for another shape, for ids outside [0, K), and for a token with both zeros and codes.
        """
        tokens = self._tokens(ids)
        if tokens.ndim != 2:
            raise DataError(f"ids must be those of one object, [{self.num_tokens}], not of {len(tokens)}")
        leaves = self._morton[tokens[self._morton, 0] > 0]
        if not len(leaves):
            return torch.empty(0, dtype=torch.int64)
        # From the leaves up: the values of a level, and the Morton key of each one's first leaf.
        nodes = self._keys[leaves]
        levels, firsts = [tokens[leaves].reshape(-1)], [nodes.repeat(self.codes_per_token)]
        for height in range(1, self.depth + 1):
            parents, start = np.unique(nodes >> 3, return_index=True)
            levels.append(np.add.reduceat(1 << (nodes & 7), start) + self.n_embed - 1)
            firsts.append(parents << 3 * height)
            nodes = parents
        values = np.concatenate(levels[::-1])
        if self.order == "depth":
            # Of the nodes with one first leaf, a stable sort keeps the largest first.
            values = values[np.concatenate(firsts[::-1]).argsort(kind="stable")]
        return torch.from_numpy(values)

    def from_values(self, values: Sequence[int] | Tensor, *, strict: bool = True) -> Parsed:
        """Return the ids [T] int64 of a sequence: the exact inverse of `to_values`.

        strict: raise DataError with the first problem, its place, and what must stand there. If False, repair instead,
            and describe each kind of repair in `problems`. Each value stands at its place, so:
            - Take a node as empty if another value stands where its mask must be, or if the sequence ends before it.
            - Leave children outside the lattice out of a mask; the node is empty if none remain.
            - Take a missing or wrong code from the same place in the nearest token before it, in Morton order, that has
              one there; if there is none, in the first one behind it; without any, take code 1.
            - Drop what follows the last code.
        Raise DataError, even then, for values that are not integers in one row.
        """
        ids, problems = self.read(integers(values, "values"))
        return parsed(ids, problems, strict)

    def read(self, values: Sequence[int], names: Sequence[str] | None = None) -> tuple[Tensor, list[Problem]]:
        """Return the ids of a sequence, repaired as `from_values` says, and its problems, whose positions are indices.

        values: another number, such as -1, stands for what is no value.
        names: what messages call the values.
        """
        if (whole := self._read_whole(values)) is not None:
            return whole, []
        walk, index = self.walk(), 0
        leaves: list[Node] = []
        codes: list[int] = []  # Q for each leaf, 0 if it is missing
        faults: dict[str, list[Problem]] = {}  # by their repair
        while values and (node := walk.node) is not None:
            value, leaf = values[index] if index < len(values) else -1, node.level == self.depth
            if leaf and walk.code == 0:
                leaves.append(node)
            taken = walk.advance(value)
            if leaf:
                codes.append(value if taken else 0)
            if not taken:
                if index <= len(values):  # what is missing is one problem, not one for each place
                    problem = self._problem(walk, index, values, names)
                    faults.setdefault(problem.repair, []).append(problem)
                if leaf:
                    walk.advance(1)
                elif not walk.advance(self.n_embed - 1 + (self.mask(value) & walk.expected.children)):
                    walk.leave_empty()
            index += 1
        if index < len(values):
            faults["surplus"] = [self._problem(walk, index, values, names)]
        problems = [each[0]._replace(message=each[0].message + further(each)) for each in faults.values()]
        return self._ids(leaves, codes), problems

    def walk(self) -> "Walk":
        """Return the state at the start of a sequence."""
        return Walk(self)

    # --- within ---

    @cached_property
    def _keys(self) -> np.ndarray:
        return morton_keys(self.lattice)

    @cached_property
    def _morton(self) -> np.ndarray:
        return self._keys.argsort()

    def _read_whole(self, values: Sequence[int]) -> Tensor | None:
        """Return the ids [T] of a sequence without a problem, None if it has one: what `read` does, many times faster.

        The ids are guessed from masks and codes apart, and right if `to_values` gives the sequence back.
        """
        array = np.asarray(values, dtype=np.int64)
        masks, codes = array[array >= self.n_embed] - self.n_embed + 1, array[array < self.n_embed]
        nodes = self._leaves_breadth(masks) if self.order == "breadth" else self._leaves_depth(masks)
        if nodes is None or not len(array) or len(codes) != len(nodes) * self.codes_per_token:
            return None
        keys = self._keys[self._morton]
        places = np.searchsorted(keys, nodes).clip(max=len(keys) - 1)
        ids = np.zeros((len(keys), self.codes_per_token), dtype=np.int64)
        ids[self._morton[places]] = codes.reshape(-1, self.codes_per_token)
        try:
            again = self.to_values(ids.reshape(-1))
        except DataError:
            return None
        return torch.from_numpy(ids.reshape(-1)) if np.array_equal(again.numpy(), array) else None

    def _leaves_breadth(self, masks: np.ndarray) -> np.ndarray | None:
        """Return the Morton keys of the leaves under masks breadth-first; None if there are too few."""
        nodes, done = np.zeros(1, dtype=np.int64), 0
        for _ in range(self.depth):
            level = masks[done : done + len(nodes)]
            if len(level) < len(nodes):
                return None
            done += len(nodes)
            parents, children = (level[:, None] >> np.arange(8) & 1).nonzero()
            nodes = nodes[parents] << 3 | children
        return nodes

    def _leaves_depth(self, masks: np.ndarray) -> np.ndarray | None:
        """Return the Morton keys of the leaves under masks depth-first; None if there are too many or too few."""
        leaves, waiting = ([], [(0, 0)]) if self.depth else ([0], [])  # (level, key)
        for mask in masks.tolist():
            if not waiting or mask > MASKS:
                return None
            level, key = waiting.pop()
            children = [key << 3 | child for child in CHILDREN[mask]]
            if level + 1 == self.depth:
                leaves += children
            else:
                waiting += [(level + 1, child) for child in reversed(children)]
        return None if waiting else np.array(leaves, dtype=np.int64)

    def _problem(self, walk: "Walk", index: int, values: Sequence[int], names: Sequence[str] | None) -> Problem:
        """Return what is wrong at an index: its value may not come next, or there is none any more."""
        if index == len(values):
            repair = "missing blocks are taken as empty, missing codes are the nearest token's"
            return Problem(index, f"the sequence ends after {index} values, but {walk} must follow", repair)
        stands = f"value {index} is {names[index] if names else self._name(values[index])}"
        if walk.node is None:
            repair = f"the last {len(values) - index} are dropped"
            return Problem(index, f"{stands}, but the object is complete before it", repair)
        if children := walk.expected.children:
            if not self.mask(values[index]):
                return Problem(index, f"{stands}; {walk} must stand there", "the block is taken as empty")
            allowed = ", ".join(str(child) for child in range(8) if children >> child & 1)
            repair = "children outside the lattice are left out"
            return Problem(index, f"{stands}; {walk} can name the children {allowed} alone", repair)
        return Problem(index, f"{stands}; {walk} must stand there", "replaced by the nearest token's")

    def _name(self, value: int) -> str:
        if 0 <= value < self.n_embed:
            return f"code {value}"
        return f"mask {self.mask(value)}" if self.mask(value) else str(value)

    def _tokens(self, ids: Sequence[int] | np.ndarray | Tensor) -> np.ndarray:
        """Return ids [T] or [B, T] as [..., L, Q] int64. Raise DataError as `to_values`."""
        array = ids.cpu().numpy() if isinstance(ids, Tensor) else np.asarray(ids)
        if array.ndim not in (1, 2) or array.shape[-1] != self.num_tokens or array.dtype.kind not in "iu":
            raise DataError(
                f"ids must be integers [{self.num_tokens}] or [B, {self.num_tokens}], not {array.dtype} "
                f"{list(array.shape)}. Use the octree of the tokenizer that made them."
            )
        array = array.astype(np.int64)
        wrong = (array < 0) | (array >= self.n_embed)
        if wrong.any():
            first = np.unravel_index(wrong.argmax(), wrong.shape)
            raise DataError(
                f"id {first[-1]} is {array[first]}; ids must lie in [0, {self.n_embed}). Use the octree of the "
                "tokenizer that made them."
            )
        tokens = array.reshape(*array.shape[:-1], -1, self.codes_per_token)
        mixed = ((tokens > 0) != (tokens[..., :1] > 0)).any(-1)
        if mixed.any():
            first = np.unravel_index(mixed.argmax(), mixed.shape)
            raise DataError(
                f"token {first[-1]} has the ids {tokens[first].tolist()}; an empty token has zeros alone, another "
                "none. Use the octree of the tokenizer that made them."
            )
        return tokens

    def _ids(self, leaves: list[Node], codes: list[int]) -> Tensor:
        """Return the ids [T] of leaves with Q codes each, where missing ones (0) are filled in."""
        ids = np.zeros((*self.lattice, self.codes_per_token), dtype=np.int64)
        if leaves:
            table = np.array(codes, dtype=np.int64).reshape(-1, self.codes_per_token)
            given = table > 0
            if not given.all():
                last = np.maximum.accumulate(np.where(given, np.arange(len(table))[:, None], -1), axis=0)
                nearest = np.where(last < 0, given.argmax(0), last)
                table = np.maximum(np.take_along_axis(table, nearest, axis=0), 1)
            ids[tuple(np.array(leaves)[:, 1:].T)] = table
        return torch.from_numpy(ids.reshape(-1))


class Walk:
    """The place in a sequence: what may come next, and where in the lattice it lies.

    One for each sequence, fed value by value: by `Octree.read`, and by whoever writes sequences.
    """

    def __init__(self, octree: Octree):
        self.octree = octree
        self.code = 0  # at a leaf, which of its codes comes next: 0 to Q - 1
        self._begun = False
        self._nodes = deque([Node(0, 0, 0, 0)])  # that are still to be written, the next one first

    @property
    def node(self) -> Node | None:
        """The node that the next value tells of; None if the sequence is complete."""
        return self._nodes[0] if self._nodes else None

    @property
    def expected(self) -> Expected:
        """What may come next."""
        node = self.node
        if node is None:
            return Expected("end", 0, True)
        if node.level == self.octree.depth:
            return Expected("code", 0, not self._begun)
        return Expected("mask", self._children(node), not self._begun)

    def advance(self, value: int) -> bool:
        """Go on by a value. Return False, and stay here, if it may not come next."""
        if not self._nodes:
            return False
        octree, node = self.octree, self._nodes[0]
        if node.level == octree.depth:
            if not 0 < value < octree.n_embed:
                return False
            self.code = (self.code + 1) % octree.codes_per_token
            if self.code == 0:
                self._nodes.popleft()
        else:
            mask = octree.mask(value)
            if not mask or mask & ~self._children(node):
                return False
            self._nodes.popleft()
            level, half = node.level + 1, 1 << (octree.depth - node.level - 1)
            children = [
                Node(level, node.x + dx * half, node.y + dy * half, node.z + dz * half) for dx, dy, dz in HALVES[mask]
            ]
            if octree.order == "breadth":
                self._nodes.extend(children)
            else:
                self._nodes.extendleft(reversed(children))
        self._begun = True
        return True

    def leave_empty(self) -> None:
        """Go on without the next node, as if it held nothing: the repair of a damaged sequence."""
        self._nodes.popleft()
        self._begun = True

    def copy(self) -> "Walk":
        """Return a walk of its own at the same place."""
        walk = Walk(self.octree)
        walk.code, walk._begun, walk._nodes = self.code, self._begun, self._nodes.copy()
        return walk

    def __str__(self) -> str:
        """What comes next, in words."""
        if (node := self.node) is None:
            return "the end"
        place, number = tuple(node[1:]), self.octree.codes_per_token
        if node.level == self.octree.depth:
            return f"{f'code {self.code + 1} of {number}' if number > 1 else 'the code'} of the token at {place}"
        side = 1 << (self.octree.depth - node.level)
        return f"the mask of the block of {side}³ tokens at {place}"

    def _children(self, node: Node) -> int:
        """Return the mask of a node's children that lie in the lattice, at least in part."""
        (X, Y, Z), half = self.octree.lattice, 1 << (self.octree.depth - node.level - 1)
        return (
            (MASKS if node.x + half < X else LOWER_X)
            & (MASKS if node.y + half < Y else LOWER_Y)
            & (MASKS if node.z + half < Z else LOWER_Z)
        )
