"""Images to patch tokens and back. Feature order is (channel, row, column), as in the reference."""

import einops

from dar_jax.common.typing import Array, Float


def patchify(image: Float[Array, "B H W C"], patch_size: int) -> Float[Array, "B N D"]:
    """Split into row-major patches: [B, (H/p)(W/p), C*p*p].

    Raises:
        ValueError: the patch size does not divide the image.
    """
    height, width = image.shape[1:3]
    if height % patch_size or width % patch_size:
        raise ValueError(
            f"image of {height}x{width} pixels: both sides must be multiples of the "
            f"patch size {patch_size}"
        )
    return einops.rearrange(
        image, "b (h p1) (w p2) c -> b (h w) (c p1 p2)", p1=patch_size, p2=patch_size
    )


def unpatchify(
    patches: Float[Array, "B N D"], patch_size: int, grid: tuple[int, int]
) -> Float[Array, "B H W C"]:
    """Invert `patchify` for a grid of (rows, columns) patches."""
    return einops.rearrange(
        patches,
        "b (h w) (c p1 p2) -> b (h p1) (w p2) c",
        h=grid[0],
        w=grid[1],
        p1=patch_size,
        p2=patch_size,
    )
