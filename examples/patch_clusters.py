"""Patch-to-Cluster attention: classify handwritten digits, and see which pixels the network groups together.

GIFT groups the parameter tokens of a frozen weight. The same class groups the patches of an image, as PaCa-ViT does
(arXiv 2203.11987), when the assignment is a softmax over the patches and the norm is layer norm. A patch here is one
pixel of an 8 x 8 image: the 64 patches look at 5 clusters instead of at each other. In the picture many clusters settle
on the gaps that tell digits apart: the hole of a 0, the notches of a 5, the empty corner beside a 6.

Takes about 20 s on one core: python examples/patch_clusters.py --out patch_clusters.png
"""

import argparse

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from gift.tuner.attention import ClusterAttention

WIDTH, CLUSTERS, EPOCHS = 48, 5, 20


class ClusterTransformer(nn.Module):
    """A Transformer of one block, whose attention costs 64 x 5 products where self-attention would cost 64 x 64."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Conv2d(1, WIDTH, 3, padding=1), nn.GELU(), nn.Conv2d(WIDTH, WIDTH, 3, padding=1))
        self.position = nn.Parameter(0.02 * torch.randn(64, WIDTH))
        self.norm = nn.LayerNorm(WIDTH)
        # A gain above 1 sets the clusters apart from the start; one far above shrinks each to a single pixel.
        self.attention = ClusterAttention(WIDTH, CLUSTERS, heads=4, assignment="softmax", norm="layer", gain=4.0)
        self.feed_forward = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 96), nn.GELU(), nn.Linear(96, WIDTH))
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits (batch, 10) and the share of every pixel in every cluster (batch, 64, 5)."""
        tokens = self.embed(images[:, None]).flatten(2).transpose(1, 2) + self.position
        attended, assignment = self.attention(self.norm(tokens))
        tokens = tokens + attended
        return self.head((tokens + self.feed_forward(tokens)).mean(dim=1)), assignment


def train(images: Tensor, labels: Tensor) -> ClusterTransformer:
    model = ClusterTransformer()
    batches = [batch for _ in range(EPOCHS) for batch in torch.randperm(len(images)).split(64)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=len(batches))
    for batch in batches:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[batch])[0], labels[batch]).backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def draw(images: Tensor, assignments: Tensor, path: str) -> None:
    """Write a picture with one row per image: the image, then each cluster over it, opaque where its share is large."""
    figure = Figure(figsize=(8, 1.35 * len(images)), layout="constrained")
    axes = figure.subplots(len(images), 1 + CLUSTERS, subplot_kw={"xticks": [], "yticks": []})
    for row, image, assignment in zip(axes, images.numpy(), assignments.numpy(), strict=True):
        for axis in row:
            axis.imshow(image, cmap="gray", vmax=1.5)
        for axis, cluster in zip(row[1:], assignment.T.reshape(CLUSTERS, 8, 8), strict=True):
            axis.imshow(cluster, cmap="plasma", alpha=(cluster / cluster.max()) ** 0.5, interpolation="bilinear")
    for column, axis in enumerate(axes[0]):
        axis.set_title(f"cluster {column}" if column else "image")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", default="patch_clusters.png", help="where the picture goes")
    path = parser.parse_args().out
    torch.manual_seed(0)
    torch.set_num_threads(1)  # starting threads costs more than it saves at this size
    pixels, digits = (torch.tensor(values) for values in load_digits(return_X_y=True))
    images = pixels.float().reshape(-1, 8, 8) / 16
    # This split is one whose first six test images are six different digits.
    train_images, test_images, train_digits, test_digits = train_test_split(images, digits, random_state=6)
    model = train(train_images, train_digits)
    with torch.no_grad():
        logits, assignments = model(test_images)
    print(f"test accuracy {100 * (logits.argmax(dim=1) == test_digits).float().mean():.1f} %")
    draw(test_images[:6], assignments[:6], path)


if __name__ == "__main__":
    main()
