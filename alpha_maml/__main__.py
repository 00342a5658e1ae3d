"""`python -m alpha_maml` and `torchrun ... -m alpha_maml`."""
from alpha_maml.launch.cli import main

if __name__ == "__main__":
    main()
