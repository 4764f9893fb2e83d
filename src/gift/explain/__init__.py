"""What an adapter learned: cluster maps of images, their scores, and pictures of them."""
