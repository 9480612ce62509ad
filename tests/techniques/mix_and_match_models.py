"""Small networks of the families that Mix-and-Match tells apart."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

IMAGES = (4, 3, 16, 16)


class BasicBlock(nn.Module):
    """conv-bn-relu-conv-bn plus shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Identity() if stride == 1 else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class SmallResNet(nn.Module):
    """Three stages; layer3's convolutions are not small."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = BasicBlock(16, 16, 1)
        self.layer2 = BasicBlock(16, 32, 2)
        self.layer3 = BasicBlock(32, 64, 2)
        self.fc = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        logits: Tensor = self.fc(F.adaptive_avg_pool2d(out, 1).flatten(1))
        return logits


def small_vgg(classes: int = 4) -> nn.Sequential:
    """VGG-11's plan, an eighth as wide: eight convolutions, three linear layers with dropout."""
    layers: list[nn.Module] = []
    width = 3
    for item in (8, "pool", 16, "pool", 32, 32, "pool", 64, 64, "pool", 64, 64):
        if isinstance(item, int):
            layers += [nn.Conv2d(width, item, 3, 1, 1), nn.BatchNorm2d(item), nn.ReLU(inplace=True)]
            width = item
        else:
            layers.append(nn.MaxPool2d(2))
    head = [nn.Linear(64, 128), nn.ReLU(), nn.Dropout(), nn.Linear(128, 128), nn.ReLU(), nn.Dropout()]
    return nn.Sequential(nn.Sequential(*layers), nn.Flatten(), nn.Sequential(*head, nn.Linear(128, classes)))


class Attention(nn.Module):
    """Self-attention with one joint projection, as in timm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width)
        out: Tensor = self.proj(mixed)
        return out


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = Attention(width, 4)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class SmallViT(nn.Module):
    """Patch embedding by a strided convolution, class token, position table, two blocks."""

    def __init__(self, classes: int = 4, width: int = 64) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 4, 4)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, 17, width))
        self.blocks = nn.Sequential(Block(width), Block(width))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.stem(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_token.expand(len(x), -1, -1), tokens], 1) + self.positions
        logits: Tensor = self.head(self.norm(self.blocks(tokens))[:, 0])
        return logits


def batches(count: int = 4, size: int = 32) -> list[tuple[Tensor, Tensor]]:
    """Four noisy patterns: learnable in seconds."""
    generator = torch.Generator().manual_seed(7)
    patterns = torch.randn(4, 3, 16, 16, generator=generator)
    found = []
    for _ in range(count):
        targets = torch.randint(4, (size,), generator=generator)
        found.append((patterns[targets] + torch.randn(size, 3, 16, 16, generator=generator), targets))
    return found


def train(net: nn.Module, data: list[tuple[Tensor, Tensor]], epochs: int) -> nn.Module:
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    net.train()
    for _ in range(epochs):
        for inputs, targets in data:
            optimizer.zero_grad()
            F.cross_entropy(net(inputs), targets).backward()
            optimizer.step()
    net.zero_grad()
    return net.eval()


def accuracy(net: nn.Module, data: list[tuple[Tensor, Tensor]]) -> float:
    net.eval()
    with torch.no_grad():
        return float(torch.stack([(net(x).argmax(1) == y).float().mean() for x, y in data]).mean())
