"""`python -m benchmarks`: every case of the main job, each in a process of its own so that memory and caches start
fresh.
"""

import subprocess
import sys

CASES = ("minilm", "efficientnet", "smollm2", "twin", "compile-time")

if __name__ == "__main__":
    codes = [
        subprocess.run([sys.executable, "-m", "benchmarks.main_job", case], check=False).returncode for case in CASES
    ]
    sys.exit(max(codes))
