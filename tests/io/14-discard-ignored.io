$ create -q -f qcow2 disk 4M
@ -f qcow2 -d ignore disk
write -P 1 0 128k
discard 0 128k
read -P 1 0 128k
map
