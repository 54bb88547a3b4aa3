// A state as bytes: one list of fields that is counted, written or read.
#ifndef EXPRESS_SRC_CORE_ARCHIVE_H_
#define EXPRESS_SRC_CORE_ARCHIVE_H_

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace express {

class Archive {
 public:
  Archive() = default;  // counts
  static Archive Writer(void* data) { return Archive(static_cast<char*>(data), nullptr); }
  static Archive Reader(const void* data) { return Archive(nullptr, static_cast<const char*>(data)); }
  // Neither writes nor reads: same() tells whether what is written there is what would be written now.
  static Archive Comparer(const void* data) {
    Archive archive;
    archive.other_ = static_cast<const char*>(data);
    return archive;
  }

  bool reading() const { return from_ != nullptr; }
  size_t used() const { return used_; }
  bool same() const { return same_; }

  template <class T>
  void Field(T& x) {
    static_assert(std::has_unique_object_representations_v<T> || std::is_floating_point_v<T>);  // no padding
    Array(&x, 1, 1);
  }
  // Room for `capacity` elements, of which the first `count` matter: the others are written as zeros, and not read.
  template <class T>
  void Array(T* data, int64_t count, int64_t capacity) {
    const size_t bytes = static_cast<size_t>(count) * sizeof(T), room = static_cast<size_t>(capacity) * sizeof(T);
    if (to_ != nullptr) {
      if (bytes > 0) std::memcpy(to_ + used_, data, bytes);
      std::memset(to_ + used_ + bytes, 0, room - bytes);
    }
    if (from_ != nullptr && bytes > 0) std::memcpy(data, from_ + used_, bytes);
    if (other_ != nullptr && bytes > 0) same_ = same_ && std::memcmp(other_ + used_, data, bytes) == 0;
    used_ += room;
  }

 private:
  Archive(char* to, const char* from) : to_(to), from_(from) {}

  char* to_ = nullptr;
  const char* from_ = nullptr;
  const char* other_ = nullptr;
  bool same_ = true;
  size_t used_ = 0;
};

}  // namespace express

#endif  // EXPRESS_SRC_CORE_ARCHIVE_H_
