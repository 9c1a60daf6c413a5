"""Vector quantisation that gives clips without attributes a pseudo-attribute: the code nearest to their embedding.

Each machine has codes of its own. A code is the running mean of the embeddings it was nearest to (van den Oord et
al. 2017, appendix A.1); one that hardly anything is near to is moved onto the clip of its machine that lies farthest
from any code. Only if that is far, and the machine's clips in the batch do not lie in one place: else idle codes chase
embeddings that move in training, and labels never settle. So there are as many pseudo-attributes as a machine's
embeddings fall into, up to the number of codes. The state follows from the batches alone, in whole: ranks that show it
the same batch agree.

Shape legend: A examples of a batch, M machines, K codes, P dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

DEAD_SHARE = 0.1  # of an average code's clips: below, a code may be moved
FAR = 0.3  # distance of unit vectors (17 degrees) beyond which a clip is worth a code of its own


class Codebook(nn.Module):
    """Codes of ``num_machines`` machines. Embeddings are unit vectors, compared by Euclidean distance."""

    code_MKP: Tensor
    count_MK: Tensor
    sum_MKP: Tensor

    def __init__(self, num_machines: int, num_codes: int, num_dims: int, *, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("code_MKP", torch.zeros(num_machines, num_codes, num_dims))
        self.register_buffer("count_MK", torch.zeros(num_machines, num_codes))  # clips a batch; 0: never used
        self.register_buffer("sum_MKP", torch.zeros(num_machines, num_codes, num_dims))

    @torch.no_grad()
    def assign(self, emb_AP: Tensor, machine_A: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest code [A] of each example's machine, 0 where none is in use yet, and the distance [A] to it."""
        far_AK = (emb_AP[:, None] - self.code_MKP[machine_A]).square().sum(2).sqrt()
        far_AK = far_AK.masked_fill(self.count_MK[machine_A] == 0, torch.inf)
        distance_A, code_A = far_AK.min(1)
        return torch.where(distance_A.isinf(), 0, code_A), distance_A

    @torch.no_grad()
    def update(self, emb_AP: Tensor, machine_A: Tensor) -> None:
        """Move the codes of the machines in this batch; others stay as they are."""
        if not len(emb_AP):
            return
        code_A, distance_A = self.assign(emb_AP, machine_A)
        num_machines, num_codes = self.count_MK.shape
        near_AC = torch.nn.functional.one_hot(machine_A * num_codes + code_A, num_machines * num_codes)
        # not in use yet: no mean to take part in
        near_AC = near_AC.to(emb_AP.dtype) * distance_A.isfinite()[:, None]
        of_machine_MA = machine_A[None] == torch.arange(num_machines, device=machine_A.device)[:, None]
        num_M = of_machine_MA.sum(1)
        heard_M = num_M > 0
        centre_MP = of_machine_MA.to(emb_AP.dtype) @ emb_AP / num_M.clamp_min(1)[:, None]
        spread_A = (emb_AP - centre_MP[machine_A]).square().sum(1).sqrt()
        keep_M1 = torch.where(heard_M, self.decay, 1.0)[:, None]
        self.count_MK.mul_(keep_M1).add_((1 - keep_M1) * near_AC.sum(0).view_as(self.count_MK))
        self.sum_MKP.mul_(keep_M1[..., None]).add_(
            (1 - keep_M1[..., None]) * (near_AC.T @ emb_AP).view_as(self.sum_MKP)
        )
        new_A = distance_A.isinf() | ((distance_A > FAR) & (spread_A > FAR / 2))
        self._revive(emb_AP, torch.where(of_machine_MA & new_A, distance_A, -1.0))
        used_MK = self.count_MK > 0
        mean_MKP = self.sum_MKP / torch.where(used_MK, self.count_MK, 1.0)[..., None]
        self.code_MKP.copy_(torch.where(used_MK[..., None], mean_MKP, self.code_MKP))

    def _revive(self, emb_AP: Tensor, distance_MA: Tensor) -> None:
        """Move one dead code of each machine onto the farthest of its clips with a distance, as an average code."""
        farthest_M, at_M = distance_MA.max(1)
        average_M = self.count_MK.mean(1)
        dead_MK = (self.count_MK <= DEAD_SHARE * average_M[:, None]) & (farthest_M > 0)[:, None]
        moved_MK = dead_MK & (dead_MK.cumsum(1) == 1)
        onto_MP = emb_AP[at_M]
        count_M1 = torch.where(average_M > 0, average_M, 1.0)[:, None]
        self.count_MK.copy_(torch.where(moved_MK, count_M1, self.count_MK))
        moved_sum_MKP = (count_M1 * onto_MP)[:, None].expand_as(self.sum_MKP)
        self.sum_MKP.copy_(torch.where(moved_MK[..., None], moved_sum_MKP, self.sum_MKP))
