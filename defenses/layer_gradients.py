"""What one layer's parameters owe to single photos: how long each photo's gradient is, and their sum, each scaled.

Both follow from the layer's input and the gradient of the loss with respect to its output; gradients of single photos need not be
formed. For a product y = W a at L places, the gradient of one photo is g aᵀ, of squared length <aᵀa, gᵀg>, two L x L matrices
(Goodfellow 2015, arXiv 1510.01799; ghost norm, Li et al. 2022, arXiv 2110.05679). Where these cost more than the gradient itself,
that is formed (Bu et al. 2022, arXiv 2205.10683).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedgc.heads import CosineHead

SLACK = (
    8  # rounding errors, in units of the last place of the terms that cancel, by which a length may come out too short
)
KEPT = 2**22  # numbers of one layer's gradients of single units that may be kept, which spares a second product
FORMING = 16  # what it costs to write and read such a number again, in multiplications
Gradients = list[tuple[Tensor, Tensor]]  # a parameter, and what is owed to it


class Units:
    """Whose gradients are clipped: each of B photos, or each of U people, by the mean gradient of the person's photos."""

    def __init__(self, photos: int, people: Tensor | None = None) -> None:
        self.size, self.place = photos, None
        if people is None:
            return
        _, self.place, count = people.unique(return_inverse=True, return_counts=True)
        self.size, self.share = len(count), (1 / count.double())[self.place]
        order = self.place.argsort(stable=True)
        rank = torch.arange(photos, device=people.device) - (count.cumsum(0) - count)[self.place[order]]
        self.slots = torch.full((self.size, int(count.max())), photos, device=people.device)  # ``photos``: nobody
        self.slots[self.place[order], rank] = order

    def mean(self, samples: Tensor) -> Tensor:
        """(B, ...) of photos -> (U, ...) of units."""
        if self.place is None:
            return samples
        shares = samples * self.share.to(samples.dtype).view(-1, *[1] * (samples.dim() - 1))
        return samples.new_zeros(self.size, *samples.shape[1:]).index_add_(0, self.place, shares)

    def joined(self, places: Tensor, shared: bool = False) -> Tensor:
        """(B, K, L) -> (U, K, mL), all places of a unit side by side, zeros where it has fewer than m photos. shared: divided by
        the unit's photos."""
        if self.place is None:
            return places
        if shared:
            places = places * self.share.to(places.dtype)[:, None, None]
        padded = torch.cat([places, places.new_zeros(1, *places.shape[1:])])[self.slots]
        return padded.transpose(1, 2).flatten(2)

    def of_photos(self, factors: Tensor) -> Tensor:
        """(U,) factors of the units' means -> (B,) of single photos."""
        return factors if self.place is None else factors[self.place] * self.share.to(factors.dtype)


@dataclass
class Part:
    """squares: (U,) squared length of each unit's gradient in these parameters, never below the truth by more than rounding.
    total: (U,) factors -> the scaled sum of the units' gradients, for each parameter."""

    squares: Tensor
    total: Callable[[Tensor], Gradients]


def formed(parameter: Tensor, samples: Tensor, ordered: Callable[[Tensor], Tensor] | None = None) -> Part:
    """Of gradients (U, ...) that exist, in the parameter's order or ``ordered`` into it."""
    flat = samples.reshape(len(samples), -1)
    ordered = ordered or (lambda total: total.view_as(parameter))
    return Part(torch.linalg.vector_norm(flat, dim=1).square(), lambda factors: [(parameter, ordered(factors @ flat))])


def products(a: Tensor, g: Tensor) -> Tensor:
    """(U,) squared lengths of g aᵀ for a (U, K, L) and g (U, O, L), with allowance for cancellation among places."""
    inner, outer = a.transpose(1, 2) @ a, g.transpose(1, 2) @ g
    diagonals = (inner.diagonal(dim1=1, dim2=2) * outer.diagonal(dim1=1, dim2=2)).clamp_min(0)
    return (inner * outer).sum(dim=(1, 2)) + allowance(diagonals.sqrt().sum(dim=1).square())


def allowance(terms: Tensor) -> Tensor:
    return SLACK * torch.finfo(terms.dtype).eps * terms


def of_conv(layer: nn.Conv2d, x: Tensor, g: Tensor, units: Units) -> list[Part]:
    bias = _bias(layer, g.flatten(2), units)
    if layer.groups > 1:
        return [formed(layer.weight, units.mean(_grouped(layer, x, g))), *bias]
    a, out = units.joined(_patches(layer, x, g.shape[2:]), shared=False), units.joined(g.flatten(2), shared=True)
    (count, K, L), outputs = a.shape, out.shape[1]
    kept = count * K * outputs <= KEPT
    if L * L * (K + outputs) < (FORMING if kept else L) * K * outputs:
        squares = products(a, out)
    elif kept:
        return [formed(layer.weight, out @ a.transpose(1, 2), _by_place(layer)), *bias]
    else:
        squares = (out @ a.transpose(1, 2)).square().sum(dim=(1, 2))
    return [Part(squares, lambda factors: [(layer.weight, _conv_total(layer, x, g, units.of_photos(factors)))]), *bias]


def _patches(layer: nn.Conv2d, x: Tensor, places: torch.Size) -> Tensor:
    """(B, K, L) of what each output place sees, K in the order (kernel, kernel, channel): in it whole runs are copied, several
    times as fast as by `F.unfold`."""
    (kh, kw), (sh, sw), (dh, dw) = layer.kernel_size, layer.stride, layer.dilation
    up, left = (int(p) for p in layer.padding)
    padded = F.pad(x, (left, left, up, up)).permute(0, 2, 3, 1).contiguous()
    b, h, w, _ = padded.stride()
    patches = padded.as_strided((len(x), *places, kh, kw, x.shape[1]), (b, sh * h, sw * w, dh * h, dw * w, 1))
    return patches.reshape(len(x), places[0] * places[1], -1).transpose(1, 2)


def _by_place(layer: nn.Conv2d) -> Callable[[Tensor], Tensor]:
    out, channels, kh, kw = layer.weight.shape
    return lambda flat: flat.view(out, kh, kw, channels).permute(0, 3, 1, 2)


def _grouped(layer: nn.Conv2d, x: Tensor, g: Tensor) -> Tensor:
    """(B, O, K/groups, k, k) gradients of single photos: a batch of grouped convolutions is one with as many more groups."""
    folded = nn.Parameter(layer.weight.detach().repeat(len(x), 1, 1, 1))
    total = _weight_gradient(
        layer, x.reshape(1, -1, *x.shape[2:]), g.reshape(1, -1, *g.shape[2:]), folded, layer.groups * len(x)
    )
    return total.view(len(x), *layer.weight.shape)


def _conv_total(layer: nn.Conv2d, x: Tensor, g: Tensor, factors: Tensor) -> Tensor:
    return _weight_gradient(layer, x, g * factors[:, None, None, None], layer.weight, layer.groups)


def _weight_gradient(layer: nn.Conv2d, x: Tensor, g: Tensor, weight: Tensor, groups: int) -> Tensor:
    return torch.ops.aten.convolution_backward(
        g, x, weight, None, layer.stride, layer.padding, layer.dilation, False, [0, 0], groups, [False, True, False]
    )[1]  # fmt: skip


def of_linear(layer: nn.Linear, x: Tensor, g: Tensor, units: Units) -> list[Part]:
    a, out = (t.reshape(len(t), -1, t.shape[-1]).transpose(1, 2) for t in (x, g))  # (B, in, L), (B, out, L)

    def total(factors: Tensor) -> Gradients:
        scaled = out * units.of_photos(factors)[:, None, None]
        return [(layer.weight, torch.einsum("bol,bil->oi", scaled, a))]

    squares = products(units.joined(a), units.joined(out, shared=True))
    return [Part(squares, total), *_bias(layer, out, units)]


def _bias(layer: nn.Conv2d | nn.Linear, g: Tensor, units: Units) -> list[Part]:
    return [] if layer.bias is None else [formed(layer.bias, units.mean(g.sum(dim=2)))]


def of_group_norm(layer: nn.GroupNorm, x: Tensor, g: Tensor, units: Units) -> list[Part]:
    """As with grouped convolutions: a batch is one photo with as many more channels and groups."""
    if not layer.affine:
        return []
    count, channels, places, groups = len(x), x.shape[1], x[0, 0].numel(), layer.num_groups
    x, g = x.contiguous(), g.contiguous()
    _, mean, rstd = torch.native_group_norm(x, None, None, count, channels, places, groups, layer.eps)
    _, scale, shift = torch.ops.aten.native_group_norm_backward(
        g.view(1, -1, places), x.view(1, -1, places), mean.view(1, -1), rstd.view(1, -1), None,
        1, count * channels, places, count * groups, [False, True, True],
    )  # fmt: skip
    return [formed(p, units.mean(t.view(count, channels))) for p, t in ((layer.weight, scale), (layer.bias, shift))]


def of_prelu(layer: nn.PReLU, x: Tensor, g: Tensor, units: Units) -> list[Part]:
    product = (g * x.clamp(max=0)).reshape(len(x), x.shape[1], -1).sum(dim=2)
    return [formed(layer.weight, units.mean(product if layer.num_parameters > 1 else product.sum(1, keepdim=True)))]


def of_cosine_head(layer: CosineHead, x: Tensor, g: Tensor, units: Units) -> list[Part]:
    """Row j of one photo's gradient is h_j (e - c_j w_j), with h = g / |W|, unit feature e, unit rows w, c = e·w. The inner
    product of two photos' gradients is then (h·h')(e·e') - (h c)·(h' c')."""
    e, rows = F.normalize(x, dim=1), F.normalize(layer.weight.detach(), dim=1)
    h = g / layer.weight.detach().norm(dim=1)
    hc = h * (e @ rows.T)
    E, H, HC = (units.joined(t[:, :, None], shared) for t, shared in ((e, False), (h, True), (hc, True)))
    whole = (H.transpose(1, 2) @ H) * (E.transpose(1, 2) @ E)
    most = whole.diagonal(dim1=1, dim2=2).clamp_min(0).sqrt().sum(dim=1).square()
    squares = (whole - HC.transpose(1, 2) @ HC).sum(dim=(1, 2)) + allowance(most)

    def total(factors: Tensor) -> Gradients:
        f = units.of_photos(factors)[:, None]
        return [(layer.weight, (f * h).T @ e - (f * hc).sum(dim=0)[:, None] * rows)]

    return [Part(squares.clamp_min(0), total)]


RULES: dict[type[nn.Module], Callable[..., list[Part]]] = {
    nn.Conv2d: of_conv, nn.Linear: of_linear, nn.GroupNorm: of_group_norm, nn.PReLU: of_prelu, CosineHead: of_cosine_head,
}  # fmt: skip


def trains(layer: nn.Module) -> bool:
    return any(p.requires_grad for p in layer.parameters(recurse=False))


def unknown_layers(module: nn.Module) -> list[str]:
    """Layers that train parameters of their own and for which there is no rule."""
    owners = ((name, m) for name, m in module.named_modules() if trains(m))
    return [name for name, m in owners if type(m) not in RULES or isinstance(getattr(m, "padding", 0), str)
            or getattr(m, "padding_mode", "zeros") != "zeros"]  # fmt: skip
