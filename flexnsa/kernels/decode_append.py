"""Writing new keys and values into pages: one launch a branch, whatever the lengths."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexnsa.pages import Entries, Pages


def write(entries: Entries, part: Pages) -> None:
    """Write entries into their pages, in place."""
    _write(*entries, *part)


@torch.library.custom_op("flexnsa::write_pages", mutates_args=("k_pages", "v_pages"))
def _write(k: Tensor, v: Tensor, slots: Tensor, k_pages: Tensor, v_pages: Tensor, table: Tensor) -> None:
    pages, heads, page, d = k_pages.shape
    batch, _, new, dv = v.shape
    table = table.contiguous()
    with torch.cuda.device_of(k):
        _store[(batch * new, heads)](
            k, v, slots.contiguous(), k_pages, v_pages, table, *k.stride(), *v.stride(), *k_pages.stride(),
            *v_pages.stride(), new, pages, table.shape[1],
            PAGE=page, D=d, DV=dv, D_PAD=triton.next_power_of_2(d), DV_PAD=triton.next_power_of_2(dv), num_warps=1,
        )  # fmt: skip


@_write.register_fake
def _(k, v, slots, k_pages, v_pages, table) -> None:  # type: ignore[no-untyped-def]
    return None


@triton.jit(do_not_specialize=["new", "pages", "width"])
def _store(
    k, v, slots, k_pages, v_pages, table, k_batch, k_head, k_token, k_dim, v_batch, v_head, v_token, v_dim,
    kp_page, kp_head, kp_place, kp_dim, vp_page, vp_head, vp_place, vp_dim, new, pages, width,
    PAGE: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, D_PAD: tl.constexpr, DV_PAD: tl.constexpr,
):  # fmt: skip
    entry, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    batch, token = entry // new, entry % new
    slot = tl.load(slots + entry + tl.zeros([1], tl.int32))
    named = (slot >= 0) & (slot < width * PAGE)
    page = tl.load(table + batch * width + slot // PAGE, mask=named, other=-1).to(tl.int64)
    place = slot % PAGE
    mapped = named & (page >= 0) & (page < pages)
    k_at, v_at = batch * k_batch + head * k_head + token * k_token, batch * v_batch + head * v_head + token * v_token
    _copy(k + k_at, k_pages + head * kp_head, page * kp_page + place * kp_place, mapped, k_dim, kp_dim, D, D_PAD)
    _copy(v + v_at, v_pages + head * vp_head, page * vp_page + place * vp_place, mapped, v_dim, vp_dim, DV, DV_PAD)


@triton.jit
def _copy(source, target, at, mapped, by_dim, by_target_dim, D: tl.constexpr, D_PAD: tl.constexpr):
    dim = tl.arange(0, D_PAD)
    mask = mapped & (dim < D)
    row = tl.load(source + dim * by_dim, mask=mask, other=0.0)
    tl.store(target + at + dim * by_target_dim, row, mask=mask)
