"""VAF (ClearSight) in plain NumPy float64. System columns are the text before the first image."""

import dataclasses

import numpy as np

from tests.reference.one_branch import softmax_seen


@dataclasses.dataclass
class Vaf:
    layers: tuple
    enhance: float = 1.15
    suppress: float = 0.95

    def weights(self, call, z):
        images = np.flatnonzero(call.image_id > 0)
        if call.layer not in self.layers or len(images) == 0:
            return softmax_seen(call, z)
        z = z.copy()
        for t, row in enumerate(call.rows):
            if row > images[-1]:
                z[:, t, images] *= self.enhance
                z[:, t, : images[0]] *= self.suppress
        return softmax_seen(call, z)
