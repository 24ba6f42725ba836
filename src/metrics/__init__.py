"""Numbers that say how good images are: logged while training, and printed."""

from .distances import colour_drift, psnr, ssim
