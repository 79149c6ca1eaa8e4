"""The same as `lvlm verify`, from a clone with the package installed (`make demo` installs it)."""

from lvlm_jax.cli.main import run

if __name__ == "__main__":
    run("verify")
