"""The run directory. `layout` names its files, `files` writes and checks them, `checkpoint`, `lock` and `directory` use both.

Importing this loads no torch; reading or writing tensors does.
"""

from ddpm_ema.rundir.checkpoint import Checkpoint
from ddpm_ema.rundir.directory import RunDir
from ddpm_ema.rundir.files import as_user_error, atomic_write, file_sha256, new_folder, read_tensors, refuse_used
from ddpm_ema.rundir.layout import OPTIMIZER_FILE, buffers_file, step_folder, weights_file
