import ApusCore

/// Exit statuses of the program, after `sysexits.h` where it has a name for the case.
package enum ExitStatus {
  /// Everything asked for was done.
  package static let success: Int32 = 0
  /// Something asked for failed.
  package static let failure: Int32 = 1
  /// The command line was wrong.
  package static let usage: Int32 = 64
  /// An input file holds something that cannot be understood.
  package static let invalidInput: Int32 = 65
  /// An input file is missing or cannot be read.
  package static let missingInput: Int32 = 66
  /// A server could not be reached.
  package static let unavailable: Int32 = 69
  /// An output file could not be written.
  package static let cannotWrite: Int32 = 73
  /// A token is missing or does not open what was asked for.
  package static let noPermission: Int32 = 77
  /// Stopped by Ctrl-C, as shells report it.
  package static let interrupted: Int32 = 130
}

/// A reason to end the program: one sentence for standard error and the exit status.
package struct CommandFailure: Error, Sendable, Equatable, CustomStringConvertible {
  /// What was wrong and what to do about it.
  package var message: String
  /// The status the program ends with.
  package var status: Int32

  /// Makes a failure.
  package init(_ message: String, status: Int32 = ExitStatus.failure) {
    self.message = message
    self.status = status
  }

  package var description: String { message }

  /// A command line that cannot be carried out.
  package static func usage(_ message: String) -> CommandFailure {
    CommandFailure(message, status: ExitStatus.usage)
  }
}

extension EngineError {
  /// The exit status that fits the kind of error.
  var exitStatus: Int32 {
    switch code {
    case .invalidCheckpoint: ExitStatus.missingInput
    case .invalidRequest, .unsupported: ExitStatus.usage
    default: ExitStatus.failure
    }
  }
}
