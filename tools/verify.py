"""The same as `lvlm verify`, for a clone with the package installed, as `make demo` does it."""

from lvlm_jax.cli.main import run

if __name__ == "__main__":
    run("verify")
