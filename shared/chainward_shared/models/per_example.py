"""The gradients of single examples with respect to one parameter: how long each is, and their weighted sum.

Lengths are right for whatever float32 can hold. A square of float32 is 0 below 2.6e-23 and infinite above 1.8e19, so that
a length from plain squares takes a small gradient for none, which no clipping norm then shortens. So gradients that are
held are measured in float64, whose range holds every product of four float32 numbers; and factors of a gradient that are
not of moderate size are first divided by a power of two of each example, which brings their largest entry to about 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.grad import conv2d_weight

_FEW_PLACES = 4
_ROUNDING = 1e-6
"""Relative error of a float32 product of vectors, generously; see `_ghost_squares`."""
_MODERATE = 16
"""Factors whose largest entry is within 2 to this power, up and down, are multiplied as they are."""
_SURE = 1e-12
"""Above this square, of factors whose largest entries are near 1, what underflows in float32 is lost in the rounding."""
_LARGEST_FACTOR = 2.0**100
"""What float32 multiplies a factor of a gradient by without overflow."""


class Gradients(Protocol):
    """The gradients of k examples with respect to one parameter, in whatever form."""

    @property
    def examples(self) -> int:
        """The number k of examples."""

    def lengths(self) -> Tensor:
        """Return the length of each, float64 (k,), never too short; not finite where a gradient is not."""

    def weighted_sum(self, factors: Tensor, rows: Tensor | None) -> Tensor:
        """Return the sum over examples times `factors`, float64 (k,), in the shape of the parameter; only of `rows` if given.

        A product of factor and length is at most 1; where float32 can't multiply by the factor, it comes out smaller.
        """

    def of_each(self) -> Tensor:
        """Return them all, (k, *shape)."""


@dataclass
class Held:
    """Gradients that were computed, (k, *shape)."""

    values: Tensor

    @property
    def examples(self) -> int:
        return len(self.values)

    def lengths(self) -> Tensor:
        return torch.linalg.vector_norm(self.values.reshape(self.examples, -1), dim=1, dtype=torch.float64)

    def weighted_sum(self, factors: Tensor, rows: Tensor | None) -> Tensor:
        flat, factors = self.values.reshape(self.examples, -1), _in_float32(factors)
        if rows is not None:
            flat, factors = flat[rows], factors[rows]
        return (factors @ flat).reshape(self.values.shape[1:])

    def of_each(self) -> Tensor:
        return self.values


class _Products:
    """Gradients as they follow from a layer's input, (k, ...), and the gradient at its output, (k, ...)."""

    def __init__(self, inputs: Tensor, backprops: Tensor) -> None:
        self.inputs, self.backprops = _Factor.of(inputs), _Factor.of(backprops)

    @property
    def examples(self) -> int:
        return len(self.inputs.values)

    def _weighted(self, factors: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return inputs, gradients and what their products are multiplied by, of `rows` if given."""
        inputs, backprops = self.inputs.values, self.backprops.values
        factors = _in_float32(factors * self.inputs.divided_by * self.backprops.divided_by)
        return (inputs, backprops, factors) if rows is None else (inputs[rows], backprops[rows], factors[rows])

    def _undivided(self, products: Tensor) -> Tensor:
        return _times(products, self.inputs.divided_by * self.backprops.divided_by)


class OfTokens(_Products):
    """Gradients of a linear layer's weight (p, d): tokens (k, T, d) and the gradient at its output (k, T, p)."""

    def lengths(self) -> Tensor:
        return _ghost_lengths(self.inputs, self.backprops, _gram, _gram)

    def weighted_sum(self, factors: Tensor, rows: Tensor | None) -> Tensor:
        tokens, backprops, factors = self._weighted(factors, rows)
        if tokens.shape[2] < backprops.shape[2]:  # scale the smaller one: new memory is what costs time
            tokens = tokens * factors[:, None, None]
        else:
            backprops = backprops * factors[:, None, None]
        return backprops.reshape(-1, backprops.shape[2]).T @ tokens.reshape(-1, tokens.shape[2])

    def of_views(self, views: int) -> OfTokens | None:
        """Return the gradients of examples that have so many rows each, as of that many times the tokens; None where they are
        cheaper as such, or their factors were divided row by row."""
        tokens, backprops = self.inputs, self.backprops
        places, inputs, outputs = tokens.values.shape[1], tokens.values.shape[2], backprops.values.shape[2]
        divided = (tokens.divided_by != 1).any() | (backprops.divided_by != 1).any()
        if bool(divided) or not ghost_is_cheaper(views * places, inputs, outputs):
            return None
        return OfTokens(
            tokens.values.reshape(-1, views * places, inputs), backprops.values.reshape(-1, views * places, outputs)
        )

    def of_each(self) -> Tensor:
        return self._undivided(torch.bmm(self.backprops.values.transpose(1, 2), self.inputs.values))


class OfConvolution(_Products):
    """Gradients of a convolution's weight, without groups: its padded input and the gradient at its output."""

    def __init__(self, layer: nn.Conv2d, images: Tensor, padding: tuple[int, int], backprops: Tensor) -> None:
        super().__init__(images, backprops)
        self.layer, self.padding = layer, padding

    def lengths(self) -> Tensor:
        return _ghost_lengths(self.inputs, self.backprops, self._gram_of_patches, _gram_of_places)

    def weighted_sum(self, factors: Tensor, rows: Tensor | None) -> Tensor:
        images, backprops, factors = self._weighted(factors, rows)
        if not len(images):
            return torch.zeros_like(self.layer.weight)
        return weight_gradient(self.layer, images, self.padding, backprops * factors[:, None, None, None])

    def of_each(self) -> Tensor:
        found = [
            weight_gradient(self.layer, image[None], self.padding, backprop[None])
            for image, backprop in zip(self.inputs.values, self.backprops.values, strict=True)
        ]
        return self._undivided(torch.stack(found))

    def _gram_of_patches(self, images: Tensor) -> Tensor:
        """Return the products of all pairs of patches, (k, T, T).

        With stride 1 patches overlap: the product of two is a sum of products of pixels, each of which is computed once.
        """
        layer = self.layer
        if layer.stride != (1, 1) or layer.kernel_size == (1, 1):
            patches = functional.unfold(images, layer.kernel_size, layer.dilation, self.padding, layer.stride)
            return _gram(patches.transpose(1, 2))
        vertical, horizontal = self.padding
        images = functional.pad(images, [horizontal, horizontal, vertical, vertical])
        n, _, height, width = images.shape
        rows, columns = self.backprops.values.shape[2:]
        pixels = _gram(images.flatten(2).transpose(1, 2)).reshape(n, height, width, height, width)
        total = pixels.new_zeros(n, rows, columns, rows, columns)
        for i in range(layer.kernel_size[0]):
            for j in range(layer.kernel_size[1]):
                y, x = i * layer.dilation[0], j * layer.dilation[1]
                total += pixels[:, y : y + rows, x : x + columns, y : y + rows, x : x + columns]
        return total.reshape(n, rows * columns, rows * columns)


def of_views(gradients: Gradients, views: int) -> Gradients:
    """Return the gradients of examples of which each has `views` rows after one another: the sum of theirs."""
    if views == 1:
        return gradients
    if isinstance(gradients, OfTokens) and (found := gradients.of_views(views)) is not None:
        return found
    each = gradients.of_each()
    return Held(each.reshape(-1, views, *each.shape[1:]).sum(dim=1))


def weight_gradient(layer: nn.Conv2d, images: Tensor, padding: tuple[int, int], backprops: Tensor) -> Tensor:
    """Return the summed gradient of a convolution's weight. A large weight over few places is slow as a convolution."""
    if backprops.shape[2] * backprops.shape[3] <= _FEW_PLACES and layer.groups == 1:
        patches = functional.unfold(images, layer.kernel_size, layer.dilation, padding, layer.stride)
        rows = patches.transpose(1, 2).reshape(-1, patches.shape[1])
        found = backprops.permute(1, 0, 2, 3).reshape(layer.out_channels, -1) @ rows
        return found.reshape(layer.weight.shape)
    return conv2d_weight(images, layer.weight.shape, backprops, layer.stride, padding, layer.dilation, layer.groups)


def ghost_is_cheaper(places: int, inputs: int, outputs: int) -> bool:
    """Tell whether two (T, T) matrices cost less than a gradient (p, d) of each example (Bu et al. 2022, section 3.2)."""
    return 2 * places**2 <= inputs * outputs


@dataclass
class _Factor:
    """What gradients are a product of, within the range that float32 multiplies in without loss.

    Attributes
    ----------
    values : (k, ...)
    scale : for each example a power of two near its largest entry, float64 (k,); 0 where all are zero
    divided_by : by what `values` were divided, float64 (k,): the scale, or 1 where all scales are moderate
    """

    values: Tensor
    scale: Tensor
    divided_by: Tensor

    @classmethod
    def of(cls, values: Tensor) -> _Factor:
        low, high = values.flatten(1).aminmax(dim=1)
        largest = torch.maximum(-low, high)
        exponents = torch.where(largest.isfinite() & (largest > 0), torch.frexp(largest).exponent, 0)
        scale = torch.ldexp(torch.ones_like(largest, dtype=torch.float64), exponents)
        divided_by = torch.ones_like(scale)
        if int(exponents.abs().max()) > _MODERATE:  # in float64: 2^-148 has no inverse in float32
            values, divided_by = _times(values, 1 / scale), scale
        return cls(values, scale * (largest != 0), divided_by)


def _times(values: Tensor, factors: Tensor) -> Tensor:
    """Return each example, (k, ...), times its power of two, float64 (k,)."""
    return (values.double() * factors.reshape(-1, *[1] * (values.ndim - 1))).to(values.dtype)


def _in_float32(factors: Tensor) -> Tensor:
    """Return the factors as float32: those that are too large for it smaller, those that are too small for it 0."""
    return torch.where(factors < 1 / _LARGEST_FACTOR, 0.0, factors).clamp(max=_LARGEST_FACTOR).float()


def _gram(rows: Tensor) -> Tensor:
    """Return the products of all pairs of T vectors, (k, T, T), of a tensor (k, T, d)."""
    return torch.bmm(rows, rows.transpose(1, 2))


def _gram_of_places(images: Tensor) -> Tensor:
    return _gram(images.flatten(2).transpose(1, 2))


def _ghost_lengths(
    one: _Factor, other: _Factor, gram: Callable[[Tensor], Tensor], gram_of_other: Callable[[Tensor], Tensor]
) -> Tensor:
    """Return the length of each product, float64 (k,), of two factors and how their (T, T) matrices are computed."""
    scale = one.scale * other.scale
    whole = torch.where(scale > 0, one.divided_by * other.divided_by / scale, 0.0).square()[:, None, None]
    squares = _ghost_squares(gram(one.values) * whole.to(one.values.dtype), gram_of_other(other.values)).double()
    # Where the factors cancel, or each is small where the other is large, underflow may have left nothing
    unsure = ((squares < _SURE) & (scale > 0)).nonzero().squeeze(1)
    if len(unsure):
        first, second = one.values[unsure].double(), other.values[unsure].double()
        squares[unsure] = _ghost_squares(gram(first) * whole[unsure], gram_of_other(second))
    return squares.sqrt() * scale


def _ghost_squares(inputs: Tensor, outputs: Tensor) -> Tensor:
    """Return ``|b^T a|^2`` of each example, (k,), from ``a a^T`` and ``b b^T``, (k, T, T): rounded up, never down.

    Terms may cancel, and what rounding leaves must not pass for a short gradient, which would then not be clipped. The
    error is at most that of the products times ``(sum |a_i| |b_i|)^2``, which is added.
    """
    lengths = (inputs.diagonal(dim1=1, dim2=2) * outputs.diagonal(dim1=1, dim2=2)).clamp(min=0).sqrt().sum(dim=1)
    squares = torch.bmm(inputs.flatten(1)[:, None], outputs.flatten(1)[:, :, None]).reshape(-1)
    return squares.clamp(min=0) + _ROUNDING * lengths.square()
