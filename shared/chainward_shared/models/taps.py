"""Read a model's attention and embedding out of its forward pass, without changing what it computes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from chainward_shared.errors import ModelError

if TYPE_CHECKING:  # timm takes seconds to import: see `architecture`
    from timm.models.vision_transformer import Attention, VisionTransformer
    from typing_extensions import TypeIs

SUPPORTED = (
    "vision transformers with standard attention (vit_*, deit_*) and convolutional networks in stages "
    "(convnext_*, resnet*, resnetv2_*, regnet*, densenet*, efficientnet_*, mobilenet*)"
)


class Taps:
    """Forward hooks that keep what attention transfer, privileged teachers and attention maps need.

    The hooks read; the model's outputs stay the same bit for bit, in training and evaluation mode, under autocast and
    `torch.no_grad`. Each forward pass replaces what the one before it left. Use as a context manager, or call `close`.

    Parameters
    ----------
    model : a timm model
    attention : keep the spatial attention of the tapped stages
    embedding : keep the input of the classifier

    Raises
    ------
    ModelError
        The model has no stages or blocks that are known here, or no classifier.
    """

    def __init__(self, model: nn.Module, *, attention: bool = False, embedding: bool = False) -> None:
        classifier = _classifier(model) if embedding else None
        self._hooks = ExitStack()
        self._maps: dict[int, Tensor] = {}
        self._embedding: Tensor | None = None
        if attention:
            if is_transformer(model):
                self._tap_blocks(model)
            else:
                for index, stage in enumerate(conv_stages(model)):
                    self._hooks.enter_context(hooked([stage], partial(self._keep_activation, index)))
        if classifier is not None:
            handle = classifier.register_forward_pre_hook(self._keep_embedding)
            self._hooks.callback(handle.remove)

    @property
    def attention(self) -> list[Tensor]:
        """Spatial attention of each tapped stage in the last forward pass, (n, positions), float32, differentiable.

        Convolutional network: mean over the channels of the squared activation at the output of every stage.
        Vision transformer: attention over the patches, mean over the heads, in the middle block (the one that ends the
        first half of the depth) and the last; two of them, since the maps of neighbouring blocks are alike and each costs
        a link time. The query is the class token where the classifier reads it, else the mean over the patches' own
        queries: an average-pooled model may hold a class token that nothing trains. What falls on the tokens that
        are no patches is left out, so a row may sum to less than 1.
        """
        return [self._maps[index] for index in sorted(self._maps)]

    @property
    def embedding(self) -> Tensor:
        """Input of the classifier in the last forward pass, (n, d), float32: of the class token's in a distilled DeiT."""
        if self._embedding is None:
            raise RuntimeError("no embedding: tap the model with embedding=True and call it first")
        return self._embedding

    def close(self) -> None:
        """Take the hooks off and let go of the tensors."""
        self._hooks.close()
        self._maps.clear()
        self._embedding = None

    def __enter__(self) -> Taps:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _tap_blocks(self, model: VisionTransformer) -> None:
        attentions = block_attentions(model)
        depth = len(attentions)
        for index in sorted({max(0, depth // 2 - 1), depth - 1}):
            keep = partial(self._keep_attention, index, model)
            self._hooks.enter_context(hook_queries_and_keys(attentions[index], keep))

    def _keep_attention(self, index: int, model: VisionTransformer, queries: Tensor, keys: Tensor) -> None:
        prefix = model.num_prefix_tokens
        queries = queries[:, :, :1] if reads_class_token(model) else queries[:, :, prefix:]
        self._maps[index] = attention_probabilities(queries, keys)[..., prefix:].mean(dim=(1, 2))

    def _keep_activation(self, index: int, stage: nn.Module, args: Any, output: Tensor) -> None:
        check_feature_map(stage, output)
        with torch.autocast(output.device.type, enabled=False):
            self._maps[index] = output.float().square().mean(dim=1).flatten(1)

    def _keep_embedding(self, classifier: nn.Module, args: tuple[Tensor, ...]) -> None:
        features = args[0]
        if features.ndim == 4 and features.shape[2:] == (1, 1):  # a classifier that is a 1 x 1 convolution
            features = features.flatten(1)
        if features.ndim != 2:
            raise ModelError(
                f"the classifier reads features of shape {tuple(features.shape)}, not (n, d): "
                "use a backbone that pools its features"
            )
        self._embedding = features.float()


def embedding_size(model: nn.Module) -> int:
    """Return the width d of `Taps.embedding`.

    Raises
    ------
    ModelError
        The model has no classifier that is one linear layer.
    """
    classifier = _classifier(model)
    return classifier.in_features if isinstance(classifier, nn.Linear) else classifier.in_channels


def is_transformer(model: nn.Module) -> TypeIs[VisionTransformer]:
    """Tell whether `model` is one of timm's vision transformers."""
    from timm.models.vision_transformer import VisionTransformer

    return isinstance(model, VisionTransformer)


def block_attentions(model: VisionTransformer) -> list[Attention]:
    """Return the attention layer of every block.

    Raises
    ------
    ModelError
        A block computes its attention in another way than timm's standard one.
    """
    from timm.models.vision_transformer import Attention

    found = [getattr(block, "attn", None) for block in model.blocks]
    if not found or any(getattr(type(layer), "forward", None) is not Attention.forward for layer in found):
        raise ModelError(f"{type(model).__name__} has no standard attention in its blocks: supported are {SUPPORTED}")
    return [layer for layer in found if isinstance(layer, Attention)]


def reads_class_token(model: VisionTransformer) -> bool:
    """Tell whether the classifier reads a class token; else it pools the patches."""
    return bool(model.has_class_token) and model.global_pool == "token"


def attention_probabilities(queries: Tensor, keys: Tensor) -> Tensor:
    """Return ``softmax(q k^T / sqrt(d))``, (n, heads, queries, keys), float32, of tensors (n, heads, tokens, d)."""
    with torch.autocast(queries.device.type, enabled=False):
        scaled = queries.float() * queries.shape[-1] ** -0.5
        return (scaled @ keys.float().transpose(-2, -1)).softmax(dim=-1)


def conv_stages(model: nn.Module) -> list[nn.Module]:
    """Return the stages of a convolutional network, in order.

    Raises
    ------
    ModelError
        No stages are known for this kind of model.
    """
    stages = getattr(model, "stages", None)
    if isinstance(stages, nn.Sequential | nn.ModuleList) and len(stages):
        return list(stages)
    blocks = getattr(model, "blocks", None)
    if isinstance(blocks, nn.Sequential) and all(isinstance(stage, nn.Sequential) for stage in blocks):
        return list(blocks)  # EfficientNet, MobileNet
    for owner, prefix in ((model, "layer"), (model, "s"), (getattr(model, "features", None), "denseblock")):
        numbered = [getattr(owner, f"{prefix}{number}", None) for number in range(1, 5)]
        found = [stage for stage in numbered if isinstance(stage, nn.Module)]
        if len(found) == len(numbered):
            return found
    raise ModelError(f"{type(model).__name__} has no attention that can be read: supported are {SUPPORTED}")


def check_feature_map(stage: nn.Module, output: object) -> None:
    """Check that a stage yields channels and two dimensions of space.

    Raises
    ------
    ModelError
        It yields something else, e.g. tokens.
    """
    if not isinstance(output, Tensor) or output.ndim != 4:
        raise ModelError(
            f"a stage ({type(stage).__name__}) yields no feature map (n, channels, h, w): supported are {SUPPORTED}"
        )


@contextmanager
def hook_queries_and_keys(layer: Attention, receive: Callable[[Tensor, Tensor], None]) -> Iterator[None]:
    """Call `receive` with the queries and keys, (n, heads, tokens, d), of every pass through an attention layer.

    They are caught as the layer uses them: timm passes both through `q_norm` and `k_norm`, which are `nn.Identity` where there
    is no norm. Their outputs are there under fused attention too, and nothing is computed a second time.
    """
    waiting: list[Tensor] = []

    def keep_queries(module: nn.Module, args: Any, output: Tensor) -> None:
        waiting[:] = [output]

    def receive_both(module: nn.Module, args: Any, output: Tensor) -> None:
        receive(waiting.pop(), output)

    with hooked([layer.q_norm], keep_queries), hooked([layer.k_norm], receive_both):
        yield


@contextmanager
def hooked(modules: Iterable[nn.Module], hook: Callable[..., Tensor | None]) -> Iterator[None]:
    """Have `hook` called with each module, its arguments and its output, after every pass through it."""
    with ExitStack() as hooks:
        for module in modules:
            hooks.callback(module.register_forward_hook(hook).remove)
        yield


def _classifier(model: nn.Module) -> nn.Linear | nn.Conv2d:
    get_classifier: Any = getattr(model, "get_classifier", None)
    classifier = get_classifier() if get_classifier else None
    if isinstance(classifier, tuple | list):  # a distilled DeiT: the class token's, the distillation token's
        classifier = classifier[0]
    if not isinstance(classifier, nn.Linear | nn.Conv2d):
        raise ModelError(f"{type(model).__name__} has no embedding that can be read: its classifier is no linear layer")
    return classifier
