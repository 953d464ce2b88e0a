// Failures in words: which kernel, block and thread, and the line of a return address with what it was inlined into.
#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

#include <map>
#include <vector>

#include "runtime.h"

namespace simt {
namespace {

struct Failure {
  std::string text;
  Place places[2];
};
std::vector<Failure> pending;  // of this launch
std::vector<std::string> failures;

const char* base(const char* path) { return strrchr(path, '/') ? strrchr(path, '/') + 1 : path; }

std::string look_up(const void* pc) {
  std::string text;
  Dl_info info;
  if (!pc || !dladdr(pc, &info)) return text;
  char line[4096];
  const size_t offset = static_cast<const char*>(pc) - static_cast<const char*>(info.dli_fbase) - 1;
  snprintf(line, sizeof line, "LD_PRELOAD= addr2line -i -e '%s' %#zx 2>/dev/null", info.dli_fname, offset);
  FILE* const pipe = popen(line, "r");
  while (pipe && fgets(line, sizeof line, pipe)) {
    line[strcspn(line, " \n")] = 0;
    const char* place = base(line);
    if (strchr(place, '?') || !strncmp(place, "simt_host.h", 11)) continue;
    text += (text.empty() ? "" : " in ") + std::string(place);
  }
  if (pipe) pclose(pipe);
  return text;
}

std::string words(Place place) {
  static std::map<const void*, std::string> known;
  const auto found = known.try_emplace(place.pc);
  if (found.second) found.first->second = look_up(place.pc);
  if (!found.first->second.empty() || !place.site.file) return found.first->second;
  return base(place.site.file) + (":" + std::to_string(place.site.line));
}

}  // namespace

std::string describe(const char* what, const unsigned* xyz) {
  std::string text = what + (" " + std::to_string(xyz[0]));
  if (xyz[1] || xyz[2]) text += "," + std::to_string(xyz[1]) + "," + std::to_string(xyz[2]);
  return text;
}

void report(Place a, Place b, const char* format, va_list values) {
  char text[1024];
  vsnprintf(text, sizeof text, format, values);
  pending.push_back({where_we_are() + ": " + text, {a, b}});
}

void report(Place a, Place b, const char* format, ...) {
  va_list values;
  va_start(values, format);
  report(a, b, format, values);
  va_end(values);
}

void finish_reports() {
  for (Failure& f : pending) {
    for (int i = 0; i < 2; ++i) {
      const char token[] = {'@', static_cast<char>('0' + i), 0};
      const size_t at = f.text.find(token);
      if (at != std::string::npos) f.text.replace(at, 2, words(f.places[i]));
    }
    failures.push_back(f.text);
  }
  pending.clear();
}

void forget_reports() { failures.clear(); }

}  // namespace simt

int simt_failures() { return static_cast<int>(simt::failures.size()); }
const char* simt_failure(int i) { return simt::failures.at(i).c_str(); }
