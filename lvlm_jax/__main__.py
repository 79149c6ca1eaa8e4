"""`python -m lvlm_jax COMMAND ...` is `lvlm COMMAND ...`."""

from lvlm_jax.cli.main import main

if __name__ == "__main__":
    main()
