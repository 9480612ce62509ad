"""SigmaBNet: a shared backbone, a binary tree of routers, one specializer per branch, one head per leaf."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..config import SigmaBConfig
from ..counting import macs as count_macs
from ..counting import parameter_count
from ..errors import ConfigError
from ..modes import evaluating
from .modality import Modality, modality
from .plan import Plan, child, module_key, prefixes
from .segments import call

ROUTINGS = ("auto", "soft", "hard")


class Projection(nn.Module):
    """Pooled feature (B, C) -> latent (B, D): Linear, LayerNorm, Dropout."""

    def __init__(self, channels: int, dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, dim)
        self.norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, pooled: torch.Tensor) -> torch.Tensor:
        latent: torch.Tensor = self.dropout(self.norm(self.linear(pooled)))
        return latent


class Router(nn.Module):
    """Pooled feature (B, C) -> logits of the two branches (B, 2), divided by ``temperature``."""

    def __init__(self, channels: int, dim: int, *, dropout: float = 0.0, temperature: float = 1.0) -> None:
        super().__init__()
        self.projection = Projection(channels, dim, dropout)
        self.linear = nn.Linear(dim, 2)
        self.temperature = temperature

    def forward(self, pooled: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.linear(self.projection(pooled)) / self.temperature
        return logits


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of a net; ``active`` is the largest path, routers on it included."""

    total: int
    active: int
    per_path: dict[str, int]
    backbone: int
    routers: int


@dataclass(frozen=True)
class MacCounts:
    """Multiply-accumulates for the given batch; ``total`` is soft routing over all leaves."""

    active: int
    per_path: dict[str, int]
    backbone: int
    total: int


class SigmaBNet(nn.Module):
    """A network of which each input runs one root-to-leaf path (arXiv 2606.09924).

    Attributes:
        routing: ``"auto"`` (soft in ``train()``, hard in ``eval()``), ``"soft"`` or ``"hard"``. It does
            not depend on the training flag unless it is ``"auto"``: tools that trace set ``"soft"``.
        leaves: paths of the leaves; the position of a path is its leaf index.
    """

    def __init__(
        self,
        *,
        backbone: nn.Module,
        routers: Mapping[str, Router],
        specializers: Mapping[str, nn.Module],
        heads: Mapping[str, nn.Module],
        plan: Plan,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.routers = nn.ModuleDict({module_key(path): m for path, m in routers.items()})
        self.specializers = nn.ModuleDict({module_key(path): m for path, m in specializers.items()})
        self.heads = nn.ModuleDict({module_key(path): m for path, m in heads.items()})
        self.plan = plan
        self.leaves = plan.leaves
        self.inner_nodes = plan.inner_nodes
        self.modalities: tuple[Modality, ...] = tuple(modality(name) for name in plan.modalities)
        self._routing = "auto"

    # Routing mode ---------------------------------------------------------------------------------

    @property
    def config(self) -> SigmaBConfig:
        return self.plan.config

    @property
    def modality(self) -> Modality:
        """Kind of data at the backbone's output."""
        return self.modalities[0]

    @property
    def routing(self) -> str:
        return self._routing

    @routing.setter
    def routing(self, value: str) -> None:
        if value not in ROUTINGS:
            raise ConfigError(f"routing must be one of {', '.join(ROUTINGS)}; got {value!r}")
        self._routing = value

    def _soft(self) -> bool:
        return self.training if self._routing == "auto" else self._routing == "soft"

    # Forward --------------------------------------------------------------------------------------

    def forward(self, *inputs: Any, **named: Any) -> torch.Tensor:
        """Logits (B, classes): mixed over all leaves by probability (soft) or of one path (hard)."""
        frontier = self._backbone(inputs, named)
        if self._soft():
            logits, log_p = self._all_leaves(frontier)
            weights = log_p.exp().to(logits.dtype)
            return torch.einsum("bkc,bk->bc", logits, weights)
        if torch.compiler.is_exporting():
            return self._conditional("", frontier)
        return self._one_path(frontier)

    def forward_routed(self, *inputs: Any, **named: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (B, classes) and leaf index (B,) of hard routing, whatever ``routing`` says, in one pass."""
        return self._routed(self._backbone(inputs, named))

    def forward_leaves(self, *inputs: Any, **named: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of every leaf (B, K, classes) and log-probabilities (B, K), float32."""
        return self._all_leaves(self._backbone(inputs, named))

    def route(self, *inputs: Any, **named: Any) -> torch.Tensor:
        """Leaf index of each sample in hard routing, (B,)."""
        frontier = self._backbone(inputs, named)
        index = torch.zeros(self.modality.size(frontier), dtype=torch.long, device=_device(frontier))
        for path, _, rows in self._descend("", frontier, None, stop=self.plan.depth):
            index[rows if rows is not None else slice(None)] = self.leaves.index(path)
        return index

    def leaf_probabilities(self, *inputs: Any, **named: Any) -> torch.Tensor:
        """p_leaf(k|x) of eq. 2, (B, K): the product of the branch probabilities on each path."""
        return self.forward_leaves(*inputs, **named)[1].exp()

    def loss(
        self,
        x: Any,
        y: torch.Tensor,
        *,
        label_smoothing: float = 0.0,
        teacher_logits: torch.Tensor | None = None,
        distillation_weight: float = 0.0,
    ) -> torch.Tensor:
        """Soft-routing loss of eq. 8 for inputs ``x`` (tensor, tuple, or batch object), targets (B,)."""
        from ..tuning.losses import soft_routing_loss

        logits, log_p = call(self.forward_leaves, x)
        return soft_routing_loss(
            logits,
            log_p,
            y,
            responsibility_weight=self.config.responsibility_weight,
            responsibility_temperature=self.config.responsibility_temperature,
            label_smoothing=label_smoothing,
            teacher_logits=teacher_logits,
            distillation_weight=distillation_weight,
        )

    def _backbone(self, inputs: tuple[Any, ...], named: Mapping[str, Any]) -> Any:
        if len(inputs) == 1 and isinstance(inputs[0], (tuple, list)) and not named:
            inputs = tuple(inputs[0])
        return self.backbone(*inputs, **named)

    def _router_logits(self, path: str, frontier: Any) -> torch.Tensor:
        kind = self.modalities[len(prefixes(path))]
        logits: torch.Tensor = self.routers[module_key(path)](kind.pool(frontier))
        return logits

    def _all_leaves(self, frontier: Any) -> tuple[torch.Tensor, torch.Tensor]:
        logits: list[torch.Tensor] = []
        log_p: list[torch.Tensor] = []

        def visit(path: str, value: Any, so_far: torch.Tensor | None) -> None:
            if path in self.leaves:
                assert so_far is not None
                logits.append(call(self.heads[module_key(path)], value))
                log_p.append(so_far)
                return
            step = torch.log_softmax(self._router_logits(path, value).float(), dim=1)
            for branch in (0, 1):
                below = child(path, branch)
                total = step[:, branch] if so_far is None else so_far + step[:, branch]
                visit(below, call(self.specializers[module_key(below)], value), total)

        visit("", frontier, None)
        return torch.stack(logits, dim=1), torch.stack(log_p, dim=1)

    def _one_path(self, frontier: Any) -> torch.Tensor:
        return self._routed(frontier)[0]

    def _routed(self, frontier: Any) -> tuple[torch.Tensor, torch.Tensor]:
        outputs: list[torch.Tensor] = []
        order: list[torch.Tensor] = []
        index: list[torch.Tensor] = []
        for path, value, rows in self._descend("", frontier, None, stop=self.plan.depth + 1):
            output = call(self.heads[module_key(path)], value)
            leaf = output.new_full((len(output),), self.leaves.index(path), dtype=torch.long)
            if rows is None:
                return output, leaf  # the whole batch took one path
            outputs.append(output)
            order.append(rows)
            index.append(leaf)
        back = torch.argsort(torch.cat(order))
        return torch.cat(outputs)[back], torch.cat(index)[back]

    def _descend(
        self, path: str, frontier: Any, rows: torch.Tensor | None, *, stop: int
    ) -> Iterator[tuple[str, Any, torch.Tensor | None]]:
        """Leaves that samples reach: (path, frontier there, their rows; None for the whole batch).

        With ``stop`` at the tree's depth the last specializers are left out and the frontier is None.
        """
        depth = len(prefixes(path))
        if depth == self.plan.depth:
            yield path, frontier, rows
            return
        kind = self.modalities[depth]
        choice = self._router_logits(path, frontier).argmax(dim=1)
        parts: list[tuple[int, Any, torch.Tensor | None]] = []
        if len(choice) == 1:
            parts.append((int(choice), frontier, rows))
        else:
            for branch in (0, 1):
                index = (choice == branch).nonzero().flatten()
                if len(index) == len(choice):
                    parts.append((branch, frontier, rows))
                elif len(index):
                    own = index if rows is None else rows[index]
                    parts.append((branch, kind.take(frontier, index), own))
        for branch, value, below in parts:
            target = child(path, branch)
            if depth + 1 < stop:
                value = call(self.specializers[module_key(target)], value)
            yield from self._descend(target, value if depth + 1 < stop else None, below, stop=stop)

    def _conditional(self, path: str, frontier: Any) -> torch.Tensor:
        """Hard routing of a batch of one as nested torch.cond, for export."""
        if len(prefixes(path)) == self.plan.depth:
            logits: torch.Tensor = call(self.heads[module_key(path)], frontier)
            return logits
        score = self._router_logits(path, frontier)

        def branch(number: int) -> Callable[..., torch.Tensor]:
            below = child(path, number)

            def run(*values: Any) -> torch.Tensor:
                return self._conditional(below, call(self.specializers[module_key(below)], values))

            return run

        operands = tuple(frontier) if isinstance(frontier, (tuple, list)) else (frontier,)
        result: torch.Tensor = torch.cond(score[0, 1] > score[0, 0], branch(1), branch(0), operands)
        return result

    # Counts ---------------------------------------------------------------------------------------

    def path_modules(self, leaf: str) -> list[tuple[str, nn.Module]]:
        """Modules of one path in order of use, by qualified name.

        Raises:
            ConfigError: ``leaf`` is no leaf of this tree.
        """
        if leaf not in self.leaves:
            raise ConfigError(f"the tree has no leaf {leaf!r}; its leaves: {', '.join(self.leaves)}")
        names = ["backbone", "routers.root"]
        for prefix in prefixes(leaf):
            names.append(f"specializers.{module_key(prefix)}")
            names.append(f"heads.{module_key(leaf)}" if prefix == leaf else f"routers.{module_key(prefix)}")
        return [(name, self.get_submodule(name)) for name in names]

    def parameter_counts(self) -> ParameterCounts:
        per_path = {leaf: parameter_count(*(m for _, m in self.path_modules(leaf))) for leaf in self.leaves}
        return ParameterCounts(
            total=parameter_count(self),
            active=max(per_path.values()),
            per_path=per_path,
            backbone=parameter_count(self.backbone),
            routers=parameter_count(self.routers),
        )

    def macs(self, example: Any) -> MacCounts:
        """Multiply-accumulates for ``example`` (one batch of inputs), per path and over all leaves."""
        with evaluating(self):
            backbone = count_macs(self.backbone, example)
            frontiers = {"": call(self.backbone, example)}
            cost = {"": backbone}
            total = backbone
            for path in self.inner_nodes:
                kind = self.modalities[len(prefixes(path))]
                router = count_macs(self.routers[module_key(path)], kind.pool(frontiers[path]))
                total += router
                for branch in (0, 1):
                    below = child(path, branch)
                    module = self.specializers[module_key(below)]
                    own = count_macs(module, frontiers[path])
                    frontiers[below] = call(module, frontiers[path])
                    cost[below] = cost[path] + router + own
                    total += own
            for leaf in self.leaves:
                head = count_macs(self.heads[module_key(leaf)], frontiers[leaf])
                cost[leaf] += head
                total += head
        per_path = {leaf: cost[leaf] for leaf in self.leaves}
        return MacCounts(active=max(per_path.values()), per_path=per_path, backbone=backbone, total=total)


def _device(frontier: Any) -> torch.device:
    value = frontier[0] if isinstance(frontier, (tuple, list)) else frontier
    device: torch.device = value.device
    return device
