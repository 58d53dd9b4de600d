"""Running programs that a model wrote, which may do anything, so that they do nothing.

A program is run by bubblewrap in namespaces of its own, as a user that is not root (root hands over
to uid 65534 first), without capabilities, and never in any other way: where no sandbox is found
that holds (`find_sandbox` tries it), nothing is run.

- *It sees* /usr, a few settings of toolchains in /etc, folders named as toolchains, all of them
  read-only; its own folder, which lies in memory; devices without content (null, zero, random); and
  of /proc its own processes, with what the kernel tells anybody (processor, memory, load). It sees
  no home folder, no password file, no environment, no descriptor, no process of this machine.
- *It reaches* no network, the loopback of this machine included, and no socket or shared memory of
  others. It can make sockets of AF_UNIX, for its own processes, and no others; of /dev/shm it has
  16 MiB of its own.
- *It uses* at most what `Limits` says: time, processes, memory, files, output. `watch` tells what
  memory is counted. All that it started is gone before `Sandbox.run` returns, and when this process
  dies.
- *It asks* the kernel for none of the calls in `seccomp`.

Not protected against:

- a fault of the kernel that can be reached by the calls that are left, or of the processor (timing
  of caches). Where that matters, evaluate in a virtual machine that is thrown away;
- secrets in files under /usr, or in a folder named as a toolchain, that anybody may read;
- short excess of memory: what is held is looked at 20 times a second, so that it may be over the
  limit by what is written in that time (84 MiB in buffers of sockets, on two cores);
- memory that is not counted. Shared memory that no process maps at that moment is not seen: at
  worst processes × address space. Nor are small things that the kernel keeps for a process: up to
  16 MiB of records of mappings for each process, 64 KiB in each pipe, up to 20 MiB a second of file
  locks. Only a cgroup counts all, and it has to be made from outside: see docs/evaluation.md. The
  kernel, out of memory, ends these processes before others, unless they undo that;
- use of all cores for `wall_seconds`: a program that is timed beside it may be slowed down;
- a program written to pass: it shares a process with its tests (see `languages`), and the
  sandbox's first process, which tells its exit code, runs as the same user.
"""

from fusellm.evaluation.code.sandbox.bubblewrap import FOLDER as FOLDER
from fusellm.evaluation.code.sandbox.bubblewrap import Sandbox as Sandbox
from fusellm.evaluation.code.sandbox.bubblewrap import find_sandbox as find_sandbox
from fusellm.evaluation.code.sandbox.bubblewrap import pack as pack
from fusellm.evaluation.code.sandbox.languages import LANGUAGES as LANGUAGES
from fusellm.evaluation.code.sandbox.languages import Language as Language
from fusellm.evaluation.code.sandbox.limits import MIB as MIB
from fusellm.evaluation.code.sandbox.limits import Limits as Limits
from fusellm.evaluation.code.sandbox.limits import Outcome as Outcome
from fusellm.evaluation.code.sandbox.toolchain import Toolchain as Toolchain
from fusellm.evaluation.code.sandbox.toolchain import Verdict as Verdict
from fusellm.evaluation.code.sandbox.toolchain import find_toolchain as find_toolchain
