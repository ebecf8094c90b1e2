$ create -q -f qcow2 disk 4M
@ -f qcow2 disk
write -q 0 4k
read -q 0 4k
write -C 0 8k
read -C 0 512
discard -C 0 64k
discard -q 0 64k
