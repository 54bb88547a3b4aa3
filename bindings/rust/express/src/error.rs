use express_sys as sys;
use std::ffi::CStr;
use std::fmt;

/// What a call of the library returned. Later versions may add to these.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
#[allow(missing_docs)] // the names say it; express.h says more
pub enum Status {
    InvalidArgument,
    OutOfRange,
    ShapeMismatch,
    DtypeMismatch,
    DeviceMismatch,
    NotFinite,
    BudgetTooSmall,
    WouldCompress,
    RollbackUnavailable,
    BufferTooSmall,
    SizeOverflow,
    OutOfMemory,
    Unsupported,
    Broken,
    Internal,
    DeviceError,
    StepsPending,
    RingFull,
    /// A status that this crate does not know.
    Unknown(i32),
}

const STATUSES: [Status; 18] = [
    Status::InvalidArgument,
    Status::OutOfRange,
    Status::ShapeMismatch,
    Status::DtypeMismatch,
    Status::DeviceMismatch,
    Status::NotFinite,
    Status::BudgetTooSmall,
    Status::WouldCompress,
    Status::RollbackUnavailable,
    Status::BufferTooSmall,
    Status::SizeOverflow,
    Status::OutOfMemory,
    Status::Unsupported,
    Status::Broken,
    Status::Internal,
    Status::DeviceError,
    Status::StepsPending,
    Status::RingFull,
];

impl Status {
    /// From the number of the C ABI; 0, which is no failure, gives `Unknown(0)`.
    pub fn from_number(number: i32) -> Status {
        match usize::try_from(number) {
            Ok(n) if (1..=STATUSES.len()).contains(&n) => STATUSES[n - 1],
            _ => Status::Unknown(number),
        }
    }

    /// The number of the C ABI.
    pub fn number(self) -> i32 {
        match self {
            Status::Unknown(number) => number,
            known => STATUSES.iter().position(|&s| s == known).map_or(0, |at| at as i32 + 1),
        }
    }

    /// The name in the C ABI, for example `EXPRESS_STATUS_OUT_OF_RANGE`.
    pub fn name(self) -> &'static str {
        // A static string, ASCII.
        unsafe { CStr::from_ptr(sys::express_status_name(self.number())) }.to_str().unwrap_or("")
    }
}

/// Why a call failed: its status, and a message that names the argument, what was expected and what came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    status: Status,
    message: String,
}

impl Error {
    pub(crate) fn new(status: Status, message: impl Into<String>) -> Error {
        Error { status, message: message.into() }
    }
    /// How the call failed.
    pub fn status(&self) -> Status {
        self.status
    }
    /// What was wrong.
    pub fn message(&self) -> &str {
        &self.message
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.status.name(), self.message)
    }
}

impl std::error::Error for Error {}

/// The result of a call.
pub type Result<T> = std::result::Result<T, Error>;

/// The message of a failure is the calling thread's, until its next failure.
pub(crate) fn check(status: sys::express_status) -> Result<()> {
    if status == sys::EXPRESS_STATUS_OK {
        return Ok(());
    }
    let message = unsafe { CStr::from_ptr(sys::express_last_error()) };
    Err(Error::new(Status::from_number(status), message.to_string_lossy()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statuses_round_trip() {
        for number in 1..=STATUSES.len() as i32 {
            let status = Status::from_number(number);
            assert!(!matches!(status, Status::Unknown(_)));
            assert_eq!(status.number(), number);
            let name: String = format!("{status:?}")
                .chars()
                .flat_map(|c| if c.is_uppercase() { vec!['_', c] } else { vec![c.to_ascii_uppercase()] })
                .collect();
            assert_eq!(status.name(), format!("EXPRESS_STATUS{name}"));
        }
        for number in [-1, 0, STATUSES.len() as i32 + 1] {
            assert_eq!(Status::from_number(number), Status::Unknown(number));
            assert_eq!(Status::from_number(number).number(), number);
        }
        assert_eq!(Status::Unknown(STATUSES.len() as i32 + 1).name(), "EXPRESS_STATUS_UNKNOWN", "a status is missing");
    }
}
