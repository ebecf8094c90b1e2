$ create -q -f qcow2 disk 4M
@ -f qcow2 -r disk
read -P 0 0 64k
length
map
