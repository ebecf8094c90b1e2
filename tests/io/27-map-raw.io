$ create -q -f raw disk 4M
@ -f raw disk
map
write 0 64k
map
alloc 0 1M
