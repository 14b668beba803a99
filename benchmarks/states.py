"""What is saved: states of a GPT-2-like model after real training steps. Never zeros: disks like them too well."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.scale import Scale

SEQUENCES, CONTEXT = 2, 64
HEADS = 4


class Block(nn.Module):
    """Attention and a feed-forward layer, as in GPT-2."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.before_attention, self.before_feed = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attend, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        rows, length, width = x.shape
        parts = self.attend(self.before_attention(x)).view(rows, length, 3, HEADS, width // HEADS)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        seen = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.project(seen.transpose(1, 2).reshape(rows, length, width))
        return x + self.feed(self.before_feed(x))


class Gpt(nn.Module):
    """GPT-2's shape. The output layer is the embedding, used twice: one name, so that no format stumbles over a tie."""

    def __init__(self, scale: Scale) -> None:
        super().__init__()
        self.tokens = nn.Embedding(scale.vocabulary, scale.width)
        self.positions = nn.Embedding(CONTEXT, scale.width)
        self.blocks = nn.Sequential(*(Block(scale.width) for _ in range(scale.layers)))
        self.norm = nn.LayerNorm(scale.width)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        return functional.linear(self.norm(self.blocks(x)), self.tokens.weight)


class Adapted(nn.Module):
    """A frozen linear layer plus a trained low-rank part, as LoRA has it."""

    def __init__(self, frozen: nn.Linear, rank: int = 8) -> None:
        super().__init__()
        self.frozen = frozen
        self.down = nn.Parameter(torch.randn(rank, frozen.in_features) / frozen.in_features)
        self.up = nn.Parameter(torch.randn(frozen.out_features, rank) / rank)

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(x) + functional.linear(functional.linear(x, self.down), self.up)


class State:
    """A model, its optimizer, and how to go on training. *seed* chooses the tokens that it trains with."""

    def __init__(self, model: Gpt, *, seed: int = 0, steps: int = 2) -> None:
        self.model = model
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        self._random = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            self.train_step()

    def train_step(self) -> None:
        """One step of next-token prediction. Changes every trained tensor and every moment."""
        shape = (SEQUENCES, CONTEXT)
        tokens = torch.randint(self.model.tokens.num_embeddings, shape, generator=self._random)
        logits = self.model(tokens[:, :-1])
        loss = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def change(self) -> None:
        """
        What a step does to the bytes, without its work: every weight and every moment takes another value in place.

        Each stays within a per cent of what it was, so what trains on is a model as before.
        """
        with torch.no_grad():
            for name, tensor in self.tensors.items():
                tensor.add_(1) if name.endswith(".step") else tensor.mul_(1 + 2**-7)

    @property
    def components(self) -> dict[str, object]:
        """As ckptman wants it."""
        return {"model": self.model, "optimizer": self.optimizer}

    @property
    def dicts(self) -> dict[str, dict[str, object]]:
        """As torch's own tools want it. The tensors in it are the live ones."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Every live tensor under a flat name, as safetensors and NumPy trees want it."""
        moments = {
            f"optimizer.{number}.{name}": moment
            for number, moments in self.optimizer.state_dict()["state"].items()
            for name, moment in moments.items()
        }
        return {**{f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}, **moments}

    @property
    def nbytes(self) -> int:
        return total_nbytes(self.tensors.values())

    @property
    def model_nbytes(self) -> int:
        return total_nbytes(self.model.state_dict().values())

    def place(self, loaded: dict[str, Tensor]) -> None:
        """Copy what a tool without live objects has loaded into them."""
        with torch.no_grad():
            for name, tensor in self.tensors.items():
                tensor.copy_(loaded[name])

    def fingerprint(self) -> dict[str, int]:
        """Tells whether a load reached the live objects: the sum of each tensor's bits, exact, as integers."""
        return {name: int(tensor.detach().view(torch.int32).sum()) for name, tensor in self.tensors.items()}


def trained(scale: Scale, *, seed: int = 0) -> State:
    """A fully trained state: weights and two moments for each, after real steps."""
    torch.manual_seed(seed)
    return State(Gpt(scale), seed=seed)


def blank(scale: Scale) -> State:
    """The shapes of a trained state, moments included, in memory that nobody has written yet."""
    with torch.device("meta"):
        model = Gpt(scale)
    state = State(model.to_empty(device="cpu"), steps=0)
    for weight in model.parameters():
        moments = {name: torch.empty_like(weight.detach()) for name in ("exp_avg", "exp_avg_sq")}
        state.optimizer.state[weight] = {"step": torch.empty(()), **moments}
    return state


def adapted(scale: Scale) -> State:
    """A frozen base with small trained adapters at the feed-forward layers; moments for these only."""
    torch.manual_seed(0)
    model = Gpt(scale).requires_grad_(False)
    for block in model.blocks:
        for place in (0, 2):
            block.feed[place] = Adapted(block.feed[place])
    return State(model)


class Loose:
    """Tensors of 64 floats without a model: *count* of them, or one with the same bytes."""

    def __init__(self, count: int, *, as_one: bool, seed: int = 0) -> None:
        random = torch.Generator().manual_seed(seed)
        shape, number = ((count * 64,), 1) if as_one else ((64,), count)
        self.tensors = {f"t{i}": torch.randn(shape, generator=random) for i in range(number)}

    @property
    def components(self) -> dict[str, object]:
        return {"tensors": self.tensors}

    @property
    def dicts(self) -> dict[str, Tensor]:
        return self.tensors

    def change(self) -> None:
        """Every tensor differs from what was saved last: nothing can be borrowed."""
        torch._foreach_add_(list(self.tensors.values()), 1.0)

    def place(self, loaded: dict[str, Tensor]) -> None:
        for name, tensor in self.tensors.items():
            tensor.copy_(loaded[name])


def total_nbytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
