"""`python -m gift`, and `torchrun --nproc-per-node 2 -m gift train ...` or `accelerate launch -m gift train ...`."""

from gift.cli import main

main()
