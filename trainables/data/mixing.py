"""Machine plus noise at a signal-to-noise ratio, in batches, on whatever device the waves are on.

Waves come level-normalised out of a corpus; nothing is checked here, a silent mixture stays silent.

Shape legend: B batch, T samples.
"""

from __future__ import annotations

import torch
from torch import Tensor


def mix(machine_BT: Tensor, noise_BT: Tensor, snr_db_B: Tensor) -> Tensor:
    """The mixture [B, T] of unit-RMS machine and noise at ``snr_db_B``, brought back to unit RMS.

    SNR is ``10 log10(P_machine / P_noise)`` over the clip (Saengthong et al. 2025). The level of a mixture carries
    its SNR, so it is removed: a microphone's gain is not known either.
    """
    noise_gain_B1 = torch.pow(10.0, -snr_db_B / 20)[:, None]
    # three passes over memory in place of six: on a CPU that is all the time there is
    mixture_BT = torch.addcmul(machine_BT, noise_BT, noise_gain_B1)
    rms_B1 = torch.linalg.vector_norm(mixture_BT, dim=-1, keepdim=True) / mixture_BT.shape[-1] ** 0.5
    return mixture_BT.div_(rms_B1.clamp_min(1e-8))
