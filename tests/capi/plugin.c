/* A host that loads a plugin, which uses the library, with RTLD_LOCAL: plugin PLUGIN.so KEY=VALUE... */
#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

int main(int argc, char **argv) {
    void *handle = argc > 1 ? dlopen(argv[1], RTLD_NOW | RTLD_LOCAL) : NULL, *symbol = handle ? dlsym(handle, "main") : NULL;
    int (*entry)(int, char **);
    if (!symbol) {
        printf("%s\n", dlerror());
        return 2;
    }
    memcpy(&entry, &symbol, sizeof entry);
    return entry(argc - 1, argv + 1);
}
