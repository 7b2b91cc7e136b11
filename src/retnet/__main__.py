"""`python -m retnet` is `retnet`, which is how torchrun starts it."""

from retnet.cli import main

main()
