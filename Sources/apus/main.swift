import ApusCommandLine
import Glibc

exit(await ApusProgram.run(Array(CommandLine.arguments.dropFirst())))
