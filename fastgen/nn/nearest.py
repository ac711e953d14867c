"""Vector quantisation on exact nearest neighbours."""

import copy
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as tf
from torch import Tensor, nn

from fastgen import check
from fastgen.functional import nearest
from fastgen.functional.nearest import rows_of


class Quantized(NamedTuple):
    """`quantized` like x; `indices` int64 [...]; `loss` float32 []."""

    quantized: Tensor
    indices: Tensor
    loss: Tensor


class VectorQuantizer(nn.Module):
    """x ↦ e_k, k = argmin_k ‖x − e_k‖², with the gradient of the identity: VQ-VAE's bottleneck.

    Args:
        dim: D, the size of a vector.
        codebook_size: K, how many entries.
        decay: of the running averages that the entries are; used without `learnable_codebook`.
        eps: Laplace smoothing of the entries' counts.
        commitment_weight: β of the commitment loss β·mean (x − sg(e))².
        learnable_codebook: entries are learned by the gradient of mean (sg(x) − e)² in place of running averages.
        threshold_ema_dead_code: in training, an entry whose running count is below this is replaced by a vector of the
            batch; 0 replaces none.
        accept_image_fmap: x is [B, D, H, W] and the vectors lie along dimension 1.
        sync_codebook: averages, and what replaces dead entries, are those of the vectors of all processes of `group`,
            of which some may have none; None: where there are several. Their codebooks then stay equal.
        seed: of the vectors that replace dead entries.
        group: a torch.distributed group for sync_codebook; None (default) is the default group.

    forward(x, freeze_codebook=False): x [..., D] float32, float64, bfloat16 or float16, finite (or [B, D, H, W]).

    Returns: Quantized(quantized like x, indices [...] (or [B, H, W]), loss): in training the commitment loss, plus the
        codebook's own where it is learnable; 0 in eval mode.

    Raises: TypeError and ValueError naming the argument; ValueError for NaN or infinity in x; RuntimeError for
        sync_codebook=True without torch.distributed, in a process outside `group`, and in the other processes that
        average together where one of them raises for its x.

    Notes: Indices are exact, a tie goes to the lowest; no N×K matrix is made. The gradient of `quantized` goes to x as
        it is (straight-through), that of the loss to x (and to a learnable codebook, whose rows' gradients are summed
        in a fixed order). In training each call of an averaging codebook changes its buffers, of which `half()` and
        `bfloat16()` leave the averages in float32; double backward is that of the identity.

    Source: van den Oord, Vinyals and Kavukcuoglu, Neural Discrete Representation Learning, NeurIPS 2017, eq. 3 and
        appendix A.1; names of arguments and results as lucidrains/vector-quantize-pytorch's `VectorQuantize`.
    """

    codebook: Tensor
    cluster_size: Tensor
    embed_avg: Tensor
    calls: Tensor

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        *,
        decay: float = 0.8,
        eps: float = 1e-5,
        commitment_weight: float = 1.0,
        learnable_codebook: bool = False,
        threshold_ema_dead_code: float = 0.0,
        accept_image_fmap: bool = False,
        sync_codebook: bool | None = None,
        seed: int = 0,
        group: Any = None,
    ) -> None:
        super().__init__()
        self.dim = check.integer("dim", dim, least=1)
        self.codebook_size = check.integer("codebook_size", codebook_size, least=1)
        self.decay = check.number("decay", decay, least=0, most=1)
        self.eps = check.number("eps", eps, least=torch.finfo(torch.float32).tiny)  # the averages' type has it
        self.commitment_weight = check.number("commitment_weight", commitment_weight, least=0)
        self.threshold_ema_dead_code = check.number("threshold_ema_dead_code", threshold_ema_dead_code, least=0)
        for name, value in (("learnable_codebook", learnable_codebook), ("accept_image_fmap", accept_image_fmap)):
            if not isinstance(value, bool):
                raise TypeError(f"{name}: expected True or False, got {check.describe(value)}")
        if sync_codebook is not None and not isinstance(sync_codebook, bool):
            raise TypeError(f"sync_codebook: expected True, False or None, got {check.describe(sync_codebook)}")
        self.learnable_codebook, self.accept_image_fmap = learnable_codebook, accept_image_fmap
        self.sync_codebook, self.group = sync_codebook, group
        self.seed = check.integer("seed", seed, least=0, most=2**43)  # times 1,000,003 a seed
        if learnable_codebook and threshold_ema_dead_code > 0:
            raise ValueError("threshold_ema_dead_code: counts are kept of an averaging codebook alone; expected 0")
        entries = nn.init.kaiming_uniform_(torch.empty(codebook_size, dim))
        if learnable_codebook:
            self.codebook = nn.Parameter(entries)
        else:
            self.register_buffer("codebook", entries)
            self.register_buffer("cluster_size", torch.ones(codebook_size))
            self.register_buffer("embed_avg", entries.clone())
            self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def extra_repr(self) -> str:
        names = "decay eps commitment_weight learnable_codebook threshold_ema_dead_code accept_image_fmap sync_codebook"
        options = (f"{name}={getattr(self, name)!r}" for name in (*names.split(), "seed"))
        return ", ".join([f"{self.dim}, {self.codebook_size}", *options])

    def __deepcopy__(self, memo: dict[int, Any]) -> "VectorQuantizer":
        twin = type(self).__new__(type(self))
        memo |= {id(self): twin, id(self.group): self.group}  # a process group has no copies
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        """The averages are never of a half type, where counts overflow and small steps are lost."""
        before = {} if self.learnable_codebook else {n: getattr(self, n) for n in ("cluster_size", "embed_avg")}
        super()._apply(fn, recurse)
        for name, value in before.items():
            now = getattr(self, name)
            if now.dtype in (torch.float16, torch.bfloat16):
                setattr(self, name, value.to(now.device))
        return self

    def forward(self, x: Tensor, freeze_codebook: bool = False) -> Quantized:
        averages = self.training and not (self.learnable_codebook or freeze_codebook)
        try:
            x, flat, indices = self._found(x)
        except Exception:
            if averages:
                self._leave()
            raise
        codebook = self.codebook.to(flat.dtype)
        # The backward of index_select adds atomically on CUDA; that of an embedding sorts first.
        entries = tf.embedding(indices, codebook) if self.learnable_codebook else rows_of(codebook, indices)
        loss = flat.new_zeros((), dtype=torch.float32)
        if self.training and len(flat) == 0:
            # The mean over nothing is NaN; an empty sum keeps the graph.
            loss = (flat.sum() + entries.sum()).float()
        elif self.training:
            loss = self.commitment_weight * tf.mse_loss(flat, entries.detach()).float()
            if self.learnable_codebook:
                loss = loss + tf.mse_loss(entries, flat.detach()).float()
        if averages:  # also an empty batch: where several processes average, this one takes part
            self._average(flat.detach(), indices)
        # The entry itself: x + (e − x) would be rounded to the precision of x.
        quantized = (entries.detach() + (flat - flat.detach())).to(x.dtype).view(x.shape)
        if self.accept_image_fmap:
            quantized = quantized.movedim(-1, 1)
        return Quantized(quantized, indices.view(x.shape[:-1]), loss)

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """Entries [..., D] of `indices` int64 [...]; of [B, H, W] as [B, D, H, W] with accept_image_fmap."""
        check.tensor("indices", indices, dtypes=(torch.int64,))
        if self.accept_image_fmap and indices.ndim != 3:
            raise ValueError(f"indices: expected [B, H, W], got shape {list(indices.shape)}")
        if indices.device != self.codebook.device:
            raise ValueError(
                f"indices: expected the device of the codebook, {self.codebook.device}, got {indices.device}"
            )
        outside = indices[(indices < 0) | (indices >= self.codebook_size)]
        if len(outside):
            raise ValueError(f"indices: expected 0 to {self.codebook_size - 1}, got {int(outside[0])}")
        entries = self.codebook[indices]
        return entries.movedim(-1, 1) if self.accept_image_fmap else entries

    def _found(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x with the vectors last, its vectors [N, D], and their entries' indices [N]."""
        check.tensor("x", x)
        if self.accept_image_fmap:
            if x.ndim != 4:
                raise ValueError(f"x: expected [B, {self.dim}, H, W], got shape {list(x.shape)}")
            x = x.movedim(1, -1)
        if x.ndim == 0 or x.shape[-1] != self.dim:
            raise ValueError(f"x: expected vectors of {self.dim}, got shape {list(x.shape)}")
        if x.device != self.codebook.device:
            raise ValueError(f"x: expected the device of the codebook, {self.codebook.device}, got {x.device}")
        # Half types are searched and averaged in float32, as under autocast.
        flat = x.reshape(-1, self.dim).to(torch.promote_types(x.dtype, torch.float32))
        return x, flat, self._indices(flat)

    @torch.no_grad()
    def _indices(self, flat: Tensor) -> Tensor:
        if len(flat) == 0:
            return torch.empty(0, dtype=torch.int64, device=flat.device)
        try:
            return nearest(flat, self.codebook.detach().to(flat.dtype)).index[:, 0]
        except ValueError:
            check.finite("x", flat)
            check.finite("codebook", self.codebook)
            raise ValueError("x: expected squared distances from the codebook within float32, got larger") from None

    @torch.no_grad()
    def _average(self, flat: Tensor, indices: Tensor) -> None:
        """n ← γ n + (1 − γ)·count, s ← γ s + (1 − γ)·sum, e = s / n̂ with n̂ = (n + ε) Σn / (Σn + K ε)."""
        keep = self.decay
        count = indices.bincount(minlength=self.codebook_size).float()
        total = torch.zeros_like(self.embed_avg, dtype=flat.dtype)
        if flat.device.type == "cuda":  # index_add adds atomically there; index_put sorts first
            total.index_put_((indices,), flat, accumulate=True)
        else:
            total.index_add_(0, indices, flat)
        rank, size = self._place()
        if size > 1:
            dist.all_reduce(count, group=self.group)
            if count[0].isnan():
                raise RuntimeError("x: another process of the group was refused its x; its own error says why")
            dist.all_reduce(total, group=self.group)
        if not (len(flat) or (size > 1 and bool(count.any()))):
            return  # nobody had a vector: nothing to average
        self.cluster_size.mul_(keep).add_(count, alpha=1 - keep)
        self.embed_avg.mul_(keep).add_(total.to(self.embed_avg.dtype), alpha=1 - keep)
        sum_ = self.cluster_size.sum()
        smoothed = (self.cluster_size + self.eps) * (sum_ / (sum_ + self.codebook_size * self.eps))
        self.codebook.copy_(self.embed_avg / smoothed[:, None])
        if self.threshold_ema_dead_code > 0:
            self._revive(flat, rank, size)
        self.calls += 1

    @torch.no_grad()
    def _leave(self) -> None:
        """The others wait for this process's counts: they get NaN."""
        if self._place()[1] > 1:
            count = torch.full_like(self.cluster_size, torch.nan, dtype=torch.float32)  # the type of theirs
            dist.all_reduce(count, group=self.group)

    def _place(self) -> tuple[int, int]:
        """This process's rank among those that average together, and their number."""
        ready = dist.is_available() and dist.is_initialized()
        if self.sync_codebook is False or (self.sync_codebook is None and not ready):
            return 0, 1
        if not ready:
            raise RuntimeError("sync_codebook: expected torch.distributed to be initialised (torchrun)")
        if dist.get_rank(self.group) < 0:
            raise RuntimeError("group: expected a group that this process is in")
        return dist.get_rank(self.group), dist.get_world_size(self.group)

    def _revive(self, flat: Tensor, rank: int, size: int) -> None:
        dead = self.cluster_size < self.threshold_ema_dead_code
        counts = flat.new_zeros(size, dtype=torch.int64)
        counts[rank] = len(flat)
        if size > 1:
            dist.all_reduce(counts, group=self.group)
        # Drawn from the batches of all, laid one after the other by rank, and sent by whoever has it.
        first = int(counts[:rank].sum())
        random = torch.Generator().manual_seed(self.seed * 1_000_003 + int(self.calls))
        drawn = torch.randint(int(counts.sum()), (self.codebook_size,), generator=random).to(flat.device) - first
        new, mine = torch.zeros_like(self.codebook), (drawn >= 0) & (drawn < len(flat))
        new[mine] = flat[drawn[mine]].to(new.dtype)
        if size > 1:
            dist.all_reduce(new, group=self.group)
        self.codebook.copy_(torch.where(dead[:, None], new, self.codebook))
        # Its average starts as if it had been chosen just often enough.
        revived = self.threshold_ema_dead_code
        self.cluster_size.copy_(torch.where(dead, revived, self.cluster_size))
        self.embed_avg.copy_(torch.where(dead[:, None], new * revived, self.embed_avg))
