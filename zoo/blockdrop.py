"""BlockDrop: a small policy network looks at the image once and says which blocks of a ResNet run.

Source: Wu, Nagarajan, Kumar, Rennie, Davis, Grauman, Feris, "BlockDrop: Dynamic Inference Paths in Residual Networks",
CVPR 2018 (arXiv 1711.08393). Policy and residual network are two modules, and the residual one has the two forms that
the authors published: every block multiplied by 0 or 1, and blocks left out by a Python branch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgekit.zoo.resnet import BasicBlock, ResNet, ResNetConfig, conv3x3, downsampler, initialise
from edgekit.zoo.skipping import hard

__all__ = ["BlockDrop", "BlockDropConfig", "FlatResNet", "Policy"]


@dataclass(frozen=True, kw_only=True)
class BlockDropConfig(ResNetConfig):
    """Sizes of a BlockDrop network: those of its ResNet, and of the ResNet that makes the policy, equally wide.

    Args:
        policy_blocks: in each group of the policy network; one each makes the paper's ResNet-8.
        execution: which of the two published forwards the residual network uses. ``masked`` computes every block and
            multiplies by 0 or 1; ``branch`` leaves a block out, by a Python ``if``, when the whole batch drops it.
    """

    policy_blocks: tuple[int, int, int] = (1, 1, 1)
    execution: Literal["masked", "branch"] = "masked"


class _Residual(nn.Module):
    """The two convolutions of a basic block; shortcut, sum and last ReLU are left to the network."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = conv3x3(inputs, outputs, stride)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = conv3x3(outputs, outputs)
        self.bn2 = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.bn1(self.conv1(x)))
        return self.bn2(self.conv2(x))


class FlatResNet(nn.Module):
    """Residual network whose blocks follow a policy.

    Args:
        config: the sizes of its ResNet, and which forward it uses.
    """

    def __init__(self, config: BlockDropConfig) -> None:
        super().__init__()
        self.config = config
        self.conv1 = conv3x3(3, config.widths[0])
        self.bn1 = nn.BatchNorm2d(config.widths[0])
        self.relu = nn.ReLU(inplace=True)
        self.blocks = nn.ModuleList()
        self.ds = nn.ModuleList()
        inputs = config.widths[0]
        for width, blocks, stride in zip(config.widths, config.blocks, (1, 2, 2), strict=True):
            first = _Residual(inputs, width, stride)
            self.blocks.append(nn.ModuleList([first, *(_Residual(width, width) for _ in range(blocks - 1))]))
            self.ds.append(downsampler(inputs, width, stride) or nn.Identity())
            inputs = width
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(inputs, config.classes)
        initialise(self)

    def _segments(self) -> list[tuple[list[nn.Module], nn.Module]]:
        """The blocks of each group, and the shortcut of its first one."""
        return [
            (list(cast("nn.ModuleList", blocks)), shortcut)
            for blocks, shortcut in zip(self.blocks, self.ds, strict=True)
        ]

    def start_from(self, backbone: ResNet) -> None:
        """Take over the weights of a plain ResNet of the same sizes."""
        for name in ("conv1", "bn1", "fc"):
            getattr(self, name).load_state_dict(getattr(backbone, name).state_dict())
        groups = (backbone.layer1, backbone.layer2, backbone.layer3)
        for (blocks, shortcut), group in zip(self._segments(), groups, strict=True):
            for block, layer in zip(blocks, group, strict=True):
                for name in ("conv1", "bn1", "conv2", "bn2"):
                    getattr(block, name).load_state_dict(getattr(layer, name).state_dict())
            downsample = cast("BasicBlock", group[0]).downsample
            if downsample is not None:
                shortcut.load_state_dict(downsample.state_dict())

    def forward(self, x: Tensor, policy: Tensor) -> Tensor:
        """Logits, under a policy for each row.

        Args:
            x: images ``(batch, 3, 32, 32) float32``, normalised as the model card says.
            policy: ``(batch, blocks) float32``: 1 where a block runs, 0 where its input passes by it.

        Returns:
            Logits ``(batch, classes) float32``.
        """
        branch = self.config.execution == "branch"
        x = self.relu(self.bn1(self.conv1(x)))
        t = 0
        for blocks, shortcut in self._segments():
            for b, block in enumerate(blocks):
                action = policy[:, t].contiguous()
                residual = shortcut(x) if b == 0 else x
                t += 1
                if branch and action.sum() == 0:
                    x = residual
                    continue
                action_mask = action.float().view(-1, 1, 1, 1)
                fx = functional.relu(residual + block(x))
                x = fx * action_mask + residual * (1 - action_mask)
        return self.fc(torch.flatten(self.avgpool(x), 1))


class Policy(nn.Module):
    """Policy network: a small ResNet that gives every block a probability of running.

    The published one also predicts the reward, as a baseline for REINFORCE; trained straight through, this one
    needs no baseline.

    Args:
        config: its sizes, and the number of blocks that it decides on.
    """

    def __init__(self, config: BlockDropConfig) -> None:
        super().__init__()
        features = ResNetConfig(blocks=config.policy_blocks, widths=config.widths, classes=sum(config.blocks))
        # Its classifier is the policy's head.
        self.features = ResNet(features)

    def start_from(self, backbone: ResNet) -> None:
        """Look at images as the first blocks of the backbone's groups do, and favour running every block.

        By two in the logit (a probability of 0.88), whatever the image: a policy that starts at random would drop
        half of the blocks of a network that was never trained without them.
        """
        features = {name for name in self.features.state_dict() if not name.startswith("fc.")}
        given = {name: tensor for name, tensor in backbone.state_dict().items() if name in features}
        self.features.load_state_dict(given, strict=False)
        nn.init.zeros_(self.features.fc.weight)
        nn.init.constant_(self.features.fc.bias, 2.0)

    def forward(self, x: Tensor) -> Tensor:
        """Probability ``(batch, blocks) float32`` of running, for images ``(batch, 3, 32, 32) float32``."""
        return torch.sigmoid(self.features(x))


class BlockDrop(nn.Module):
    """Policy and residual network in one forward.

    Args:
        config: the sizes.

    Attributes:
        force_open: every block runs, whatever the policy says: the all-on reference that dropping is compared with.
    """

    def __init__(self, config: BlockDropConfig) -> None:
        super().__init__()
        self.config = config
        self.force_open = False
        self.policy = Policy(config)
        self.resnet = FlatResNet(config)

    def start_from(self, backbone: ResNet) -> None:
        """Take over the weights of a plain ResNet of the same sizes, with a policy that runs every block."""
        self.resnet.start_from(backbone)
        self.policy.start_from(backbone)

    def routed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits ``(batch, classes) float32`` and actions ``(batch, blocks) float32``, for training and measuring."""
        probability = self.policy(x)
        policy = hard(probability) if self.training else (probability > 0.5).float()
        if self.force_open:
            policy = torch.ones_like(policy)
        return self.resnet(x, policy), policy

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(batch, classes) float32`` of images ``(batch, 3, 32, 32) float32``."""
        logits, _ = self.routed(x)
        return logits
