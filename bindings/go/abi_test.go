package express

import (
	"fmt"
	"os"
	"reflect"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"unsafe"

	"express/internal/abi"
)

// golden are the numbers of the ABI, as a C compiler sees them, which all languages compare themselves with.
func golden(t *testing.T) map[string]int64 {
	text, err := os.ReadFile("../../capi/abi.txt")
	if err != nil {
		t.Fatal(err)
	}
	numbers := map[string]int64{}
	for _, line := range strings.Split(strings.TrimSpace(string(text)), "\n") {
		name, number, _ := strings.Cut(line, " = ")
		if numbers[name], err = strconv.ParseInt(number, 10, 64); err != nil {
			t.Fatal(err)
		}
	}
	return numbers
}

func TestNumbersAreThoseOfTheABI(t *testing.T) {
	ours := map[string]int64{
		"EXPRESS_AUTO":                          Auto,
		"EXPRESS_STATUS_OK":                     int64(StatusOK),
		"EXPRESS_STATUS_INVALID_ARGUMENT":       int64(StatusInvalidArgument),
		"EXPRESS_STATUS_OUT_OF_RANGE":           int64(StatusOutOfRange),
		"EXPRESS_STATUS_SHAPE_MISMATCH":         int64(StatusShapeMismatch),
		"EXPRESS_STATUS_DTYPE_MISMATCH":         int64(StatusDTypeMismatch),
		"EXPRESS_STATUS_DEVICE_MISMATCH":        int64(StatusDeviceMismatch),
		"EXPRESS_STATUS_NOT_FINITE":             int64(StatusNotFinite),
		"EXPRESS_STATUS_BUDGET_TOO_SMALL":       int64(StatusBudgetTooSmall),
		"EXPRESS_STATUS_WOULD_COMPRESS":         int64(StatusWouldCompress),
		"EXPRESS_STATUS_ROLLBACK_UNAVAILABLE":   int64(StatusRollbackUnavailable),
		"EXPRESS_STATUS_BUFFER_TOO_SMALL":       int64(StatusBufferTooSmall),
		"EXPRESS_STATUS_SIZE_OVERFLOW":          int64(StatusSizeOverflow),
		"EXPRESS_STATUS_OUT_OF_MEMORY":          int64(StatusOutOfMemory),
		"EXPRESS_STATUS_UNSUPPORTED":            int64(StatusUnsupported),
		"EXPRESS_STATUS_BROKEN":                 int64(StatusBroken),
		"EXPRESS_STATUS_INTERNAL":               int64(StatusInternal),
		"EXPRESS_STATUS_DEVICE_ERROR":           int64(StatusDeviceError),
		"EXPRESS_STATUS_STEPS_PENDING":          int64(StatusStepsPending),
		"EXPRESS_STATUS_RING_FULL":              int64(StatusRingFull),
		"EXPRESS_DTYPE_F32":                     int64(DTypeF32),
		"EXPRESS_DTYPE_F16":                     int64(DTypeF16),
		"EXPRESS_DTYPE_BF16":                    int64(DTypeBF16),
		"EXPRESS_DTYPE_I8":                      int64(DTypeI8),
		"EXPRESS_DTYPE_I64":                     int64(DTypeI64),
		"EXPRESS_DEVICE_CPU":                    int64(DeviceCPU),
		"EXPRESS_DEVICE_CUDA":                   int64(DeviceCUDA),
		"EXPRESS_SCHEDULE_BUDGET":               int64(ScheduleBudget),
		"EXPRESS_SCHEDULE_ROUNDS":               int64(ScheduleRounds),
		"EXPRESS_HALVING_KERNEL":                int64(HalvingKernel),
		"EXPRESS_HALVING_COIN":                  int64(HalvingCoin),
		"EXPRESS_HEAD_BUDGETS_AUTO":             int64(HeadBudgetsAuto),
		"EXPRESS_HEAD_BUDGETS_FIXED":            int64(HeadBudgetsFixed),
		"EXPRESS_HEAD_BUDGETS_OBSERVED":         int64(HeadBudgetsObserved),
		"EXPRESS_PROTECTION_SCORE_AUTO":         int64(ProtectionScoreAuto),
		"EXPRESS_PROTECTION_SCORE_ENERGY":       int64(ProtectionScoreEnergy),
		"EXPRESS_PROTECTION_SCORE_ENERGY_VALUE": int64(ProtectionScoreEnergyValue),
		"EXPRESS_ROPE_LAYOUT_HALVES":            int64(RopeLayoutHalves),
		"EXPRESS_ROPE_LAYOUT_INTERLEAVED":       int64(RopeLayoutInterleaved),
		"EXPRESS_BUDGET_ENTRIES":                int64(BudgetEntries),
		"EXPRESS_BUDGET_BYTES":                  int64(BudgetBytes),
	}
	for name, layout := range abi.Structs {
		ours[fmt.Sprintf("sizeof(%s)", name)] = int64(layout.Size())
		for i := 0; i < layout.NumField(); i++ {
			if field := layout.Field(i); field.Name != "_" { // the padding at the end
				ours[fmt.Sprintf("offsetof(%s, %s)", name, field.Name)] = int64(field.Offset)
			}
		}
	}
	want := golden(t)
	for name, number := range want {
		if got, has := ours[name]; !has || got != number {
			t.Errorf("%s: expected %d, got %d (%v)", name, number, got, has)
		}
	}
	for name := range ours {
		if _, has := want[name]; !has {
			t.Errorf("%s is not in the ABI", name)
		}
	}
}

func TestEveryFunctionIsCalled(t *testing.T) {
	functions, err := os.ReadFile("../../capi/symbols.txt")
	if err != nil {
		t.Fatal(err)
	}
	code := ""
	for _, file := range []string{"calls.c", "cache.go", "errors.go", "express.go"} {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		code += string(text)
	}
	names := strings.Fields(string(functions))
	if len(names) < 30 {
		t.Fatalf("only %d functions", len(names))
	}
	for _, name := range names {
		if !strings.Contains(code, name+"(") {
			t.Errorf("%s is not called", name)
		}
	}
}

// snake is the name in C of a field in Go.
func snake(name string) string {
	name = regexp.MustCompile("(KV|ID|DType)").ReplaceAllStringFunc(name, func(s string) string { return s[:1] + strings.ToLower(s[1:]) })
	return strings.ToLower(regexp.MustCompile("([a-z])([A-Z])").ReplaceAllString(name, "${1}_${2}"))
}

// Every field of the config, set to a number of its own, arrives in the field of C that has its name, and in no other.
func TestEveryFieldOfTheConfigArrives(t *testing.T) {
	defaults := NewConfig(1, 1, 64)
	plain, _, err := defaults.raw()
	if err != nil {
		t.Fatal(err)
	}
	left := map[string]bool{}
	for i, layout := 0, abi.Structs["express_config"]; i < layout.NumField(); i++ {
		left[layout.Field(i).Name] = true
	}
	for _, own := range []string{"struct_size", "head_share_count", "head_settings_count", "rope_frequency_count", "_", "reserved"} {
		delete(left, own)
	}
	function, _ := abi.SerialFor()
	for i := 0; i < reflect.TypeOf(defaults).NumField(); i++ {
		config, field := defaults, reflect.TypeOf(defaults).Field(i)
		name := snake(field.Name)
		if !left[name] {
			t.Errorf("%s: there is no %s", field.Name, name)
		}
		delete(left, name)
		value, want := reflect.ValueOf(&config).Elem().Field(i), ""
		switch field.Name {
		case "HeadShare":
			config.HeadShare, name, want = []float32{1, 2, 3}, "head_share_count", "3"
		case "HeadSettings":
			config.HeadSettings, name, want = []HeadSetting{{9, 8, 7, 6}}, "head_settings_count", "1"
		case "RopeFrequencies":
			config.RopeFrequencies, name, want = []float32{3, 2}, "rope_frequency_count", "2"
		case "ParallelFor", "ParallelForContext":
			value.SetPointer(function)
			want = fmt.Sprint(uintptr(function))
		case "AutoCompress", "Validate":
			value.SetBool(!value.Bool())
			want = map[bool]string{false: "0", true: "1"}[value.Bool()]
		default:
			switch value.Kind() {
			case reflect.Float64:
				value.SetFloat(float64(i) + 0.5)
			case reflect.Uint64, reflect.Uintptr:
				value.SetUint(uint64(i) + 1000)
			default:
				value.SetInt(int64(i) + 1000)
			}
			want = fmt.Sprint(value.Interface())
		}
		raw, at, err := config.raw()
		if err != nil {
			t.Fatal(err)
		}
		if field.Name == "HeadShare" && (at.shares == nil || *at.shares != 1) {
			t.Error("HeadShare is not passed")
		}
		if field.Name == "RopeFrequencies" && (at.frequencies == nil || *at.frequencies != 3) {
			t.Error("RopeFrequencies are not passed")
		}
		if field.Name == "HeadSettings" {
			if at.settings == nil || fmt.Sprint(*at.settings) != "{9 8 7 6}" {
				t.Error("HeadSettings are not passed")
			}
		}
		before, after := reflect.ValueOf(plain), reflect.ValueOf(raw)
		for j := 0; j < after.NumField(); j++ {
			at, got := after.Type().Field(j).Name, fmt.Sprint(after.Field(j))
			if kind := after.Field(j).Kind(); at == name && (kind == reflect.Pointer || kind == reflect.UnsafePointer) {
				got = fmt.Sprint(after.Field(j).Pointer())
			}
			if at == name && got != want {
				t.Errorf("%s: expected %s, got %s", name, want, got)
			}
			if at != name && got != fmt.Sprint(before.Field(j)) {
				t.Errorf("%s changes %s", field.Name, at)
			}
		}
	}
	if len(left) != 0 {
		t.Errorf("the config has no %v", left)
	}
}

// Every count of the stats, a number of its own, arrives in the field of Go that has its name.
func TestEveryStatArrives(t *testing.T) {
	convert := reflect.ValueOf(statsOf)
	from := reflect.New(convert.Type().In(0).Elem())
	for i, layout := 0, from.Type().Elem(); i < layout.NumField(); i++ {
		field := layout.Field(i)
		at := unsafe.Add(from.UnsafePointer(), field.Offset)
		switch field.Type.Kind() {
		case reflect.Int32:
			*(*int32)(at) = int32(i)
		case reflect.Int64:
			*(*int64)(at) = int64(i)
		case reflect.Float64:
			*(*float64)(at) = float64(i)
		}
	}
	to, want := convert.Call([]reflect.Value{from})[0], golden(t)
	for i := 0; i < to.NumField(); i++ {
		name := snake(to.Type().Field(i).Name)
		field, has := from.Type().Elem().FieldByName(name)
		if got := fmt.Sprint(to.Field(i)); !has || got != fmt.Sprint(field.Index[0]) {
			t.Errorf("%s: expected field %v of C, got %s", name, field.Index, got)
		}
		delete(want, fmt.Sprintf("offsetof(express_stats, %s)", name))
	}
	for _, own := range []string{"struct_size"} {
		delete(want, fmt.Sprintf("offsetof(express_stats, %s)", own))
	}
	for name := range want {
		if strings.HasPrefix(name, "offsetof(express_stats") {
			t.Errorf("%s is not in Stats", name)
		}
	}
}
