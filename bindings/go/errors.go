package express

/*
#include "calls.h"
#include <stdlib.h>
*/
import "C"

import "unsafe"

// Status is how a call ended: express_status. It is an error of its own, the one that errors.Is looks for:
//
//	if errors.Is(err, express.StatusRollbackUnavailable) { ... }
type Status int32

// The numbers are pinned: those of the C ABI.
const (
	StatusOK                  Status = C.EXPRESS_STATUS_OK
	StatusInvalidArgument     Status = C.EXPRESS_STATUS_INVALID_ARGUMENT
	StatusOutOfRange          Status = C.EXPRESS_STATUS_OUT_OF_RANGE
	StatusShapeMismatch       Status = C.EXPRESS_STATUS_SHAPE_MISMATCH
	StatusDTypeMismatch       Status = C.EXPRESS_STATUS_DTYPE_MISMATCH
	StatusDeviceMismatch      Status = C.EXPRESS_STATUS_DEVICE_MISMATCH
	StatusNotFinite           Status = C.EXPRESS_STATUS_NOT_FINITE
	StatusBudgetTooSmall      Status = C.EXPRESS_STATUS_BUDGET_TOO_SMALL
	StatusWouldCompress       Status = C.EXPRESS_STATUS_WOULD_COMPRESS
	StatusRollbackUnavailable Status = C.EXPRESS_STATUS_ROLLBACK_UNAVAILABLE
	StatusBufferTooSmall      Status = C.EXPRESS_STATUS_BUFFER_TOO_SMALL
	StatusSizeOverflow        Status = C.EXPRESS_STATUS_SIZE_OVERFLOW
	StatusOutOfMemory         Status = C.EXPRESS_STATUS_OUT_OF_MEMORY
	StatusUnsupported         Status = C.EXPRESS_STATUS_UNSUPPORTED
	StatusBroken              Status = C.EXPRESS_STATUS_BROKEN
	StatusInternal            Status = C.EXPRESS_STATUS_INTERNAL
	StatusDeviceError         Status = C.EXPRESS_STATUS_DEVICE_ERROR
	StatusStepsPending        Status = C.EXPRESS_STATUS_STEPS_PENDING
	StatusRingFull            Status = C.EXPRESS_STATUS_RING_FULL
)

// String is the name in the C ABI, for example "EXPRESS_STATUS_OUT_OF_RANGE"; "EXPRESS_STATUS_UNKNOWN" of a number that is none.
func (s Status) String() string { return C.GoString(C.express_status_name(C.express_status(s))) }

// Error is String.
func (s Status) Error() string { return s.String() }

// Error is why a call failed. The message names the argument, what was expected and what came.
type Error struct {
	Status  Status
	Message string
}

// Error has the name of the status and the message.
func (e *Error) Error() string { return e.Status.String() + ": " + e.Message }

// Unwrap is the status, for errors.Is.
func (e *Error) Unwrap() error { return e.Status }

// failure of a call: nil, or the message that the shim copied on the thread of the call.
func failure(r C.result) error {
	if r.status == C.EXPRESS_STATUS_OK {
		return nil
	}
	err := &Error{Status: Status(r.status)}
	if r.message != nil {
		err.Message = C.GoString(r.message)
		C.free(unsafe.Pointer(r.message))
	}
	return err
}
