"""What a local Ray starts in place of its node's agents: it ends with its raylet, and does nothing
else."""

import sys

if __name__ == "__main__":
    sys.stdin.read()  # a pipe of the raylet's, closed when that ends
