"""`python -m launch` and `torchrun ... -m launch`, from the checkout."""
from alpha_maml.launch.cli import main

if __name__ == "__main__":
    main()
